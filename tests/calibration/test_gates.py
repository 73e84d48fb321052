"""Gates against dense models with zeroed groups, autograd, and regressions solved on their own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call

import lit_prune
from conftest import skipping, tiny, uneven_kept, zeroed
from lit_prune.calibration.gates import Gates
from lit_prune.calibration.statistics import SKIPPED
from lit_prune.errors import UnsupportedModelError
from lit_prune.repair.input_grams import input_grams
from lit_prune.repair.predictors import predict
from lit_prune.repair.regression import SHARE_DAMPING

pytestmark = pytest.mark.core


def masks(group_sets, kept):
    found = []
    for group_set, keep in zip(group_sets, kept, strict=True):
        mask = torch.zeros(group_set.size, dtype=torch.bool)
        mask[list(keep)] = True
        found.append(mask)
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt"])
def test_a_closed_gate_is_a_group_of_zeros(name, tokens):
    model = tiny(name)
    group_sets = lit_prune.find_group_sets(model)
    kept = uneven_kept(group_sets)
    gates = Gates(model, group_sets)
    gates.set(masks(group_sets, kept))
    whole = model(tokens).logits
    with gates:
        assert torch.equal(model(tokens).logits, whole)
        with gates.open():
            found = model(tokens).logits
            with gates.closed():
                assert torch.equal(model(tokens).logits, whole)
    torch.testing.assert_close(found, zeroed(model, kept)(tokens).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(tokens).logits, whole)


def test_a_closed_block_is_passed_over(tokens):
    model = tiny()
    group_sets = lit_prune.find_group_sets(model, blocks=True)
    kept = [torch.ones(s.size, dtype=torch.bool) for s in group_sets]
    for group_set, mask in zip(group_sets, kept, strict=True):
        if group_set.kind == "block" and group_set.layer == 1:
            mask[:] = False
    gates = Gates(model, group_sets)
    gates.set(kept)
    with gates, gates.open():
        found = model(tokens).logits
    torch.testing.assert_close(found, skipping(model, ["model.layers.1"])(tokens).logits)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_derivatives_are_those_of_autograd(tokens, checkpointed):
    model = tiny()
    group_sets = lit_prune.find_group_sets(model)
    kept = masks(group_sets, uneven_kept(group_sets))
    leaves = [k.float().requires_grad_() for k in kept]
    weights = dict(model.named_parameters())
    for group_set, leaf in zip(group_sets, leaves, strict=True):
        for part in group_set.consumers:
            column = torch.zeros(weights[part.parameter].shape[part.dim])
            column = column.index_put((part.index.flatten(),), leaf.repeat_interleave(part.index.shape[1]))
            weights[part.parameter] = weights[part.parameter] * column
    functional_call(model, weights, kwargs={"input_ids": tokens, "labels": tokens}).loss.backward()
    gates = Gates(model, group_sets)
    gates.set(kept)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    with gates:
        with gates.open():
            (3 * model(input_ids=tokens, labels=tokens).loss).backward()
        first, second, samples = gates.take(scale=3.0)
    assert samples == [len(tokens)] * len(group_sets)
    for found, squares, leaf in zip(first, second, leaves, strict=True):
        torch.testing.assert_close((found / len(tokens)).float(), leaf.grad, rtol=1e-3, atol=1e-6)
        # of a mean over samples, the mean square is at least the square of the mean
        assert (squares / len(tokens) >= (found / len(tokens)) ** 2 * (1 - 1e-6)).all()


def test_predictors_are_ridge_regressions():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    groups = torch.arange(12).view(6, 2)
    keep = torch.ones(12, dtype=torch.bool)
    keep[[4, 5, 10, 11]] = False
    gram = (x.T @ x).double()
    weight = torch.randn(3, 12, generator=generator)
    found, [shares] = predict(gram, 200.0, [groups], keep, weight)
    damping = SHARE_DAMPING * 12 / 200 * float(gram.diagonal().mean())

    def regression(targets, sources):
        system = gram[sources][:, sources] + damping * torch.eye(len(sources), dtype=torch.float64)
        return torch.linalg.solve(system, gram[sources][:, targets]).T

    kept = keep.nonzero().flatten().tolist()
    for group in groups.tolist():
        sources = [k for k in kept if k not in group]
        expected = torch.zeros(2, 12, dtype=torch.float64)
        expected[:, sources] = regression(group, sources)
        torch.testing.assert_close(found[group], expected)
        # of the output, the Schur complement of the others; of a kept group with its damping, as of rows of inputs
        own = gram[group][:, group] + damping * torch.eye(2, dtype=torch.float64) * bool(keep[group].all())
        left = own - regression(group, sources) @ gram[sources][:, group]
        columns = weight[:, group].double()
        share = float(
            torch.trace(columns @ left @ columns.T) / torch.trace(columns @ gram[group][:, group] @ columns.T)
        )
        assert float(shares[groups.tolist().index(group)]) == pytest.approx(min(share, 1), rel=1e-6)


def test_what_is_removed_is_what_a_refit_would_make_of_it(tokens, batches, loss_of):
    model = tiny()
    group_sets = lit_prune.find_group_sets(model)
    kept = masks(group_sets, uneven_kept(group_sets))
    gates = Gates(model, group_sets)
    gates.set(kept)
    grams = input_grams(model, gates.linear_layers, batches, loss_of(model))
    refitted = copy.deepcopy(model)
    for name, (gram, count) in grams.items():
        keep = gates.mask_of(name, len(gram), gram.device)
        weight = refitted.get_submodule(name).weight
        groups = [index for _, index in gates.parts[name]]
        gates.predictors[name] = predict(gram, count, groups, keep, weight.detach()).matrix
        with torch.no_grad():
            weight.copy_(weight * keep + (weight * ~keep) @ gates.predictors[name])
    with gates, gates.open():
        found = model(tokens).logits
    torch.testing.assert_close(found, refitted(tokens).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, zeroed(model, uneven_kept(group_sets))(tokens).logits, atol=1e-2)


@pytest.mark.parametrize("nothing", [None, SKIPPED], ids=str)
def test_batches_without_a_loss_do_not_count(nothing, batches, loss_of):
    model = tiny()
    layers = Gates(model, lit_prune.find_group_sets(model)).linear_layers
    loss, skipped = loss_of(model), batches[1]

    def run(batch):
        found = loss(batch)
        return nothing if batch is skipped else found

    expected = input_grams(model, layers, [batches[0], batches[2]], loss)
    found = input_grams(model, layers, batches, run)
    assert found.keys() == expected.keys()
    for name, (gram, tokens) in expected.items():
        assert found[name][1] == tokens
        assert torch.equal(found[name][0], gram)
    assert input_grams(model, layers, [skipped], run) == {}


def test_a_duplicate_that_stays_has_no_derivative():
    """Where others make up for a group in full, removing it is worth nothing, to first order too."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False), torch.nn.Linear(5, 3, bias=False))
    with torch.no_grad():
        model[0].weight[1] = 2 * model[0].weight[0]
    x, y = torch.randn(50, 6), torch.randn(50, 3)
    loss = lambda batch: (model(batch[0]) - batch[1]).square().mean()  # noqa: E731
    group_sets = lit_prune.trace(model, [(x, y)], loss).group_sets
    gates = Gates(model, group_sets)
    [(name, (gram, _))] = input_grams(model, gates.linear_layers, [(x, y)], loss).items()
    keep = torch.ones(5, dtype=torch.bool)
    groups = [index for _, index in gates.parts[name]]
    gates.predictors[name], [shares] = predict(gram, 1e9, groups, keep, model[1].weight.detach())
    assert shares[:2].max() < 1e-4 < shares[2:].min()
    with gates:
        with gates.open():
            loss((x, y)).backward()
        [first], _, _ = gates.take()
    others = first[2:].abs().min()
    assert first[:2].abs().max() < 1e-3 * others


def test_experts_are_refused_by_name():
    model = tiny("mixtral", num_local_experts=3, num_experts_per_tok=2)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp.*cannot be observed"):
        Gates(model, lit_prune.find_group_sets(model))
