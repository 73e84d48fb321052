"""Statistics and importances against straightforward dense computations with autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import SMALL, tiny
from lit_prune import CalibrationError, find_group_sets
from lit_prune.calibration.collect import collect_statistics
from lit_prune.calibration.reduce import pieces, product_lines
from lit_prune.groups import GroupSet, Slice
from lit_prune.ranking.importance import group_importance
from lit_prune.ranking.registry import criteria, get_criterion, register_criterion

GRADIENT = ["taylor", "taylor_2nd", "taylor_batch", "second_order"]


def gradients_by_autograd(model, batches, loss_of):
    """The gradient of every parameter for every batch, by torch.autograd.grad."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return [dict(zip(names, torch.autograd.grad(loss_of(model)(b), parameters), strict=True)) for b in batches]


def by_hand(model, group_sets, element):
    """Sum an elementwise importance over each group, with a loop over groups and index_select."""
    parameters = dict(model.named_parameters())
    result = []
    for group_set in group_sets:
        result.append(
            torch.tensor(
                [
                    sum(
                        float(
                            element(part, parameters[part.parameter].detach().double())
                            .index_select(part.dim, part.index[g])
                            .sum()
                        )
                        for part in group_set.slices
                    )
                    for g in range(group_set.size)
                ]
            )
        )
    return result


@pytest.mark.parametrize("mode", ["streaming", "elementwise"])
@pytest.mark.parametrize("name", GRADIENT)
def test_gradient_criteria_equal_a_dense_computation(name, mode, batches, loss_of):
    model = tiny("qwen2")
    group_sets = find_group_sets(model)
    g = gradients_by_autograd(model, batches, loss_of)

    def element(part, weight):
        grads = torch.stack([b[part.parameter].double() for b in g])
        first = (weight * grads.mean(0)).abs()
        second = 0.5 * (weight**2 * (grads**2).mean(0)).abs()
        return {
            "taylor": first,
            "taylor_2nd": first + second,
            "taylor_batch": (weight * grads).abs().mean(0),
            "second_order": second,
        }[name]

    criterion = get_criterion(name)
    statistics = collect_statistics(model, group_sets, batches, loss_of(model), criterion.terms, mode=mode)
    found = group_importance(criterion, dict(model.named_parameters()), group_sets, statistics)
    for a, b in zip(found, by_hand(model, group_sets, element), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    assert all(p.grad is None for p in model.parameters())


def inputs_by_hand(model, batches, mask=None):
    """Inputs of every projection, recorded layer by layer with hooks of the test's own."""
    seen = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            handles.append(
                module.register_forward_hook(
                    lambda m, a, o, name=name: seen.setdefault(name, []).append(a[0].detach().double())
                )
            )
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return {
        name: torch.cat([(x[mask.bool()] if mask is not None else x.flatten(0, 1)) for x in xs])
        for name, xs in seen.items()
    }


def test_wanda_equals_a_dense_computation_and_normalisation_makes_mean_scores_one(batches, loss_of):
    model = tiny("qwen2")
    group_sets = find_group_sets(model)
    seen = inputs_by_hand(model, batches)

    def element(part, weight):
        if part.parameter.endswith("bias"):
            return weight.abs()
        return weight.abs() * seen[part.module].abs().mean(0)

    criterion = get_criterion("wanda")
    statistics = collect_statistics(model, group_sets, batches, loss_of(model), criterion.terms)
    parameters = dict(model.named_parameters())
    found = group_importance(criterion, parameters, group_sets, statistics)
    for a, b in zip(found, by_hand(model, group_sets, element), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    for group_set, raw, normal in zip(
        group_sets,
        found,
        group_importance(criterion, parameters, group_sets, statistics, normalize="mean"),
        strict=True,
    ):
        assert float(normal.mean()) == pytest.approx(group_set.cost, rel=1e-5)
        torch.testing.assert_close(normal / normal.sum(), raw / raw.sum())


def test_activation_statistics_equal_those_of_the_recorded_inputs_and_pass_over_padding(loss_of):
    model = tiny("llama")
    group_sets = find_group_sets(model)
    ids = torch.randint(0, SMALL["vocab_size"], (3, 8), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(8) < torch.tensor([[8], [5], [3]])).long()
    batches = [{"input_ids": ids, "attention_mask": mask}]
    terms = get_criterion("wanda").terms
    few = collect_statistics(model, group_sets, batches, lambda b: model(**b).logits.sum(), terms)
    with pytest.raises(CalibrationError, match="activations=True"):
        _ = next(iter(few.activations.values())).variance
    statistics = collect_statistics(
        model, group_sets, batches, lambda b: model(**b).logits.sum(), terms, activations=True
    )
    seen = inputs_by_hand(model, [ids], mask)
    assert statistics.tokens == 16
    for name, activation in statistics.activations.items():
        x = seen[name]
        for value, expected in (
            (activation.mean_abs, x.abs().mean(0)),
            (activation.l1, x.abs().sum(0)),
            (activation.l2, x.norm(dim=0)),
            (activation.variance, x.var(dim=0, unbiased=False)),
            (activation.mean, x.mean(0)),
        ):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


def test_the_mean_over_micro_batches_equals_one_large_batch(batches, loss_of):
    model = tiny("llama")
    group_sets = find_group_sets(model)
    criterion = get_criterion("taylor")
    results = [
        group_importance(
            criterion,
            dict(model.named_parameters()),
            group_sets,
            collect_statistics(model, group_sets, data, loss_of(model), criterion.terms),
        )
        for data in (batches, [torch.cat(batches)])
    ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_gradient_checkpointing_changes_nothing_but_recomputes(batches, loss_of):
    model = tiny("llama")
    group_sets = find_group_sets(model)
    criterion = get_criterion("taylor_2nd")
    plain = collect_statistics(model, group_sets, batches, loss_of(model), criterion.terms)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    forwards = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    again = collect_statistics(model, group_sets, batches, loss_of(model), criterion.terms)
    assert len(forwards) == 2 * len(batches)
    for a, b in zip(
        *(group_importance(criterion, dict(model.named_parameters()), group_sets, s) for s in (plain, again)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_everything_is_put_back(batches, loss_of):
    model = tiny("llama").train()
    model.model.norm.weight.requires_grad_(False)
    model.model.layers[1].eval()
    loss_of(model)(batches[0]).backward()
    before = {n: (p.requires_grad, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    group_sets = find_group_sets(model)
    terms = (*get_criterion("taylor_2nd").terms, *get_criterion("wanda").terms)
    for data, fails in ((batches, False), ([batches[0], None], True)):
        try:
            collect_statistics(model, group_sets, data, loss_of(model), terms)
            assert not fails
        except ValueError:
            assert fails
        for name, parameter in model.named_parameters():
            requires_grad, gradient = before[name]
            assert parameter.requires_grad == requires_grad
            assert (gradient is None) == (parameter.grad is None)
            assert gradient is None or torch.equal(gradient, parameter.grad)
            assert not parameter._post_accumulate_grad_hooks
        assert [m.training for m in model.modules()] == modes
        assert all(not m._forward_pre_hooks for m in model.modules())


def test_bfloat16_weights_accumulate_in_float32(batches, loss_of):
    model = tiny("llama").bfloat16()
    group_sets = find_group_sets(model)
    criterion = get_criterion("taylor_2nd")
    statistics = collect_statistics(model, group_sets, batches, loss_of(model), criterion.terms)
    assert {t.dtype for store in statistics.elementwise.values() for t in store.values()} == {torch.float32}
    assert all(
        bool((i > 0).all()) for i in group_importance(criterion, dict(model.named_parameters()), group_sets, statistics)
    )


def test_a_registered_criterion_is_used_and_bad_ones_are_refused(batches, loss_of):
    model = tiny("llama")
    group_sets = find_group_sets(model)
    name = "test-fluctuation"
    register_criterion(name, lambda w, variance: w.square() * variance, "activation_variance", consumers_only=True)
    assert name in criteria()
    criterion = get_criterion(name)
    statistics = collect_statistics(model, group_sets, batches, loss_of(model), criterion.terms)
    found = group_importance(criterion, dict(model.named_parameters()), group_sets, statistics)
    mlp = next(i for i, s in enumerate(group_sets) if s.kind == "mlp")
    x = inputs_by_hand(model, batches)[f"{group_sets[mlp].name}.down_proj"]
    weight = model.get_parameter(f"{group_sets[mlp].name}.down_proj.weight").detach().double()
    expected = x.var(dim=0, unbiased=False) * weight.square().sum(0)
    torch.testing.assert_close(found[mlp], expected.float(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="already"):
        register_criterion(name, torch.abs)
    with pytest.raises(ValueError, match="Unknown statistic 'x'"):
        register_criterion("other", torch.abs, "x")
    with pytest.raises(ValueError, match=r"known are taylor, "):
        get_criterion("none")


def test_bad_calibration_data_are_refused(batches, loss_of):
    model = tiny("llama")
    group_sets = find_group_sets(model)
    terms = get_criterion("taylor").terms
    for data, loss, message in (
        ([], loss_of(model), "no batch"),
        (batches, lambda b: None, "All 3 calibration batches were skipped"),
        (batches, lambda b: model(b).logits, "no scalar loss; found a tensor of shape"),
        (batches, lambda b: loss_of(model)(b).detach(), "does not depend"),
        (
            batches,
            lambda b: model.model.layers[0](model.model.embed_tokens(b), position_embeddings=rope(model, b)).sum(),
            "No gradient",
        ),
    ):
        with pytest.raises(CalibrationError, match=message):
            collect_statistics(model, group_sets, data, loss, terms)


def rope(model, ids):
    return model.model.rotary_emb(torch.zeros(1), torch.arange(ids.shape[1])[None])


def test_magnitude_and_random_need_no_data():
    model = tiny("llama")
    group_sets = find_group_sets(model)
    parameters = dict(model.named_parameters())
    found = group_importance(get_criterion("magnitude"), parameters, group_sets, None)
    for a, b in zip(found, by_hand(model, group_sets, lambda part, w: w.abs()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    drawn = [group_importance(get_criterion("random"), parameters, group_sets, None, seed=s) for s in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not torch.equal(drawn[0][0], drawn[2][0])


def test_tied_projections_get_their_whole_gradient(batches, loss_of):
    """A weight that the graph uses twice is scored by the sum of both gradients."""
    model = tiny("llama")
    group_sets = find_group_sets(model)
    criterion = get_criterion("taylor")

    def twice(batch):
        return loss_of(model)(batch) + model.model.layers[0].mlp.up_proj.weight.square().sum()

    oracle = copy.deepcopy(model)
    weight = oracle.model.layers[0].mlp.up_proj.weight
    total = sum(torch.autograd.grad(loss_of(oracle)(b) + weight.square().sum(), weight)[0] for b in batches) / len(
        batches
    )
    statistics = collect_statistics(model, group_sets, batches, twice, criterion.terms)
    torch.testing.assert_close(statistics.elementwise["gradient"]["model.layers.0.mlp.up_proj.weight"], total)


@pytest.mark.parametrize("mode", ["streaming", "elementwise"])
def test_fisher_equals_autograd_by_a_mask_on_what_the_consumers_read(batches, loss_of, mode):
    model = tiny("qwen2")
    group_sets = find_group_sets(model)
    masks = {s.key: torch.ones(s.size, requires_grad=True) for s in group_sets}
    expected = {s.key: torch.zeros(s.size) for s in group_sets}

    def masked(key, index):
        def hook(_, args):
            scale = torch.ones(args[0].shape[-1]).index_copy(
                0, index.flatten(), masks[key].repeat_interleave(index.shape[1])
            )
            return (args[0] * scale,)

        return hook

    handles = [
        model.get_submodule(part.module).register_forward_pre_hook(masked(s.key, part.index))
        for s in group_sets
        for part in s.consumers
    ]
    samples = [sample for batch in batches for sample in batch.split(1)]
    for sample in samples:
        gradients = torch.autograd.grad(loss_of(model)(sample), list(masks.values()))
        for key, gradient in zip(masks, gradients, strict=True):
            expected[key] += gradient.square() / len(samples)
    for handle in handles:
        handle.remove()
    criterion = get_criterion("fisher")
    statistics = collect_statistics(model, group_sets, batches, loss_of(model), criterion.terms, mode=mode)
    found = group_importance(criterion, dict(model.named_parameters()), group_sets, statistics)
    for group_set, importance in zip(group_sets, found, strict=True):
        torch.testing.assert_close(importance, expected[group_set.key], rtol=1e-4, atol=1e-12)
    assert not statistics.elementwise


def test_fisher_needs_no_gradient_of_a_weight_and_does_not_depend_on_the_size_of_batches(batches, loss_of):
    model = tiny("qwen2")
    group_sets = find_group_sets(model)
    criterion = get_criterion("fisher")
    plain = collect_statistics(model, group_sets, batches, loss_of(model), criterion.terms)
    model.requires_grad_(False)
    singles = [sample for batch in batches for sample in batch.split(1)]
    frozen = collect_statistics(model, group_sets, singles, loss_of(model), criterion.terms)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert plain.reduced.keys() == frozen.reduced.keys()
    for key, value in plain.reduced.items():
        torch.testing.assert_close(frozen.reduced[key], value, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
@pytest.mark.parametrize("name", ["taylor", "taylor_2nd"])
def test_offloaded_gradients_are_the_same_and_bfloat16_ones_nearly(batches, loss_of, name, device):
    model = tiny("llama").to(device)
    data = [b.to(device) for b in batches]
    group_sets = find_group_sets(model)
    criterion = get_criterion(name)

    def importance(**options):
        statistics = collect_statistics(model, group_sets, data, loss_of(model), criterion.terms, **options)
        kept = statistics.elementwise["gradient"].values()
        found = group_importance(criterion, dict(model.named_parameters()), group_sets, statistics)
        return found, {(v.device.type, v.dtype) for v in kept}

    plain, where = importance()
    assert where == {(device, torch.float32)}
    offloaded, where = importance(offload_gradients=True)
    assert where == {("cpu", torch.float32)}
    small, where = importance(gradient_dtype="bfloat16")
    assert where == {(device, torch.bfloat16)}
    for a, b, c in zip(plain, offloaded, small, strict=True):
        torch.testing.assert_close(a, b)
        # 8 bits of mantissa, rounded once a batch
        torch.testing.assert_close(a, c, rtol=2e-2, atol=1e-6)
        assert not torch.equal(a, c)
    with pytest.raises(ValueError, match="Unknown gradient_dtype 'float16'"):
        importance(gradient_dtype="float16")


class Reads(TorchDispatchMode):
    """Counts what makes a GPU's host wait: values read, and results whose size depends on values."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in self.waits
        self.count += func.overloadpacket.__name__ == "index" and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["taylor_2nd", "fisher", "wanda"])
def test_no_value_is_read_from_the_device_between_batches(batches, loss_of, name):
    model = tiny("llama")
    group_sets = find_group_sets(model)
    terms = get_criterion(name).terms
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 7:] = 0
    data = [{"input_ids": b, "attention_mask": mask} for b in (*batches, *batches)]

    def loss(batch):
        # layer by layer: what the model around them reads to make its masks is not ours to count
        hidden = model.model.embed_tokens(batch["input_ids"])
        for layer in model.model.layers:
            hidden = layer(hidden, position_embeddings=rope(model, batch["input_ids"]))
        return hidden.square().mean()

    counts = []
    for amount in (3, 6):
        with Reads() as reads:
            collect_statistics(model, group_sets, data[:amount], loss, terms)
        counts.append(reads.count)
    assert counts[0] == counts[1]


def test_a_gradient_that_is_not_finite_is_named_with_its_batch(batches, loss_of):
    model = tiny("llama")
    group_sets = find_group_sets(model)
    weight = model.model.layers[1].mlp.up_proj.weight

    def loss(batch):
        # finite, with an infinite derivative at 0
        extra = torch.zeros(()) if batch is not batches[1] else (weight.flatten()[0] * 0).sqrt()
        return loss_of(model)(batch) + extra

    for name in ("taylor", "second_order"):
        with pytest.raises(CalibrationError, match=r"layers\.1\.mlp\.up_proj.* is not finite in calibration batch 1"):
            collect_statistics(model, group_sets, batches, loss, get_criterion(name).terms)


def test_pieces_cover_every_element_once_and_stay_small():
    for shape in ((), (7,), (5, 3), (4, 6, 5), (1, 100), (0, 4)):
        values = torch.zeros(shape)
        for index in pieces(shape, 8):
            assert values[index].numel() <= 8
            values[index] += 1
        assert torch.equal(values, torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_lines_equal_whole_tensors(monkeypatch, dtype):
    monkeypatch.setattr("lit_prune.calibration.reduce.CPU_PIECE", 64)
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(3, 5, 40, generator=generator).to(dtype) for _ in range(2))
    lines = {dim: torch.zeros(weight.shape[dim]) for dim in range(3)}
    total = product_lines(weight, gradient, [(torch.abs_, dim, line) for dim, line in lines.items()])
    product = (weight.double() * gradient.double()).abs()
    for dim, line in lines.items():
        torch.testing.assert_close(line, product.sum([d for d in range(3) if d != dim]).float())
    torch.testing.assert_close(total, gradient.double().sum().float(), rtol=1e-4, atol=1e-3)
    gradient[2, 1, 7] = torch.nan
    assert not product_lines(weight, gradient, []).isfinite()


def test_inputs_that_change_between_two_projections_are_summed_anew():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            y = self.first(x)
            x.mul_(2)
            return y + self.second(x)

    block = Block()
    index = torch.arange(4)[:, None]
    group_set = GroupSet("", 0, "x", 4, 8, (Slice("first.weight", 1, index, 1), Slice("second.weight", 1, index, 1)))
    x = torch.rand(3, 4)
    terms = get_criterion("wanda").terms
    statistics = collect_statistics(block, [group_set], [x.clone(), x.clone()], lambda b: block(b).sum(), terms)
    first, second = (statistics.activations[n].mean_abs for n in ("first", "second"))
    torch.testing.assert_close(first, x.double().mean(0))
    torch.testing.assert_close(second, 2 * first)
