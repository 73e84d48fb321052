"""Repair against closed forms of numpy and against the layer outputs it should restore."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from conftest import SMALL, tiny, uneven_kept
from lit_prune import PruningConfig, PruningPlan, apply_plan, calibrate, find_group_sets, make_plan
from lit_prune.calibration.collect import collect_statistics
from lit_prune.repair.bias import bias_fold
from lit_prune.repair.redundancy import unexplained_share, unexplained_shares
from lit_prune.repair.refit import least_squares
from lit_prune.repair.regression import ridge


def data(tokens=200, inputs=12, outputs=5):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mixing
    y = torch.randn(tokens, outputs, generator=generator, dtype=torch.float64)
    prior = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    return x, y, prior


def test_without_damping_it_is_least_squares():
    x, y, prior = data()
    found = ridge(x.T @ x, y.T @ x, prior, 0.0)
    expected = np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_with_damping_it_is_ridge_towards_the_prior(damping):
    x, y, prior = data()
    strength = damping * (x.T @ x).diagonal().numpy()
    found = ridge(x.T @ x, y.T @ x, prior, damping)
    stacked_x = np.concatenate([x.numpy(), np.diag(np.sqrt(strength))])
    stacked_y = np.concatenate([y.numpy(), np.sqrt(strength)[:, None] * prior.numpy().T])
    expected = np.linalg.lstsq(stacked_x, stacked_y, rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_a_massive_input_does_not_switch_off_the_repair_of_the_others():
    """Of orthogonal inputs each weight goes its own way: w = w0 + step / (1 + damping), however large the others are.

    Damping by the mean of all sizes would let them go 1 / (1 + damping * 83,334) of it beside one that is 1,000 times larger.
    """
    x = torch.linalg.qr(rows_of(200, 12))[0]
    x[:, 3] *= 1000.0
    prior, step = rows_of(5, 12, 1), rows_of(5, 12, 2)
    y = x @ (prior + step).T
    found = ridge(x.T @ x, y.T @ x, prior, 0.5)
    torch.testing.assert_close(found, prior + step / 1.5, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("damping", [0.0, 0.1, 4.0])
def test_the_units_of_inputs_do_not_matter(damping):
    x, y, prior = data()
    units = torch.logspace(-3, 3, x.shape[1], dtype=torch.float64)
    found = ridge(x.T @ x, y.T @ x, prior, damping)
    scaled = ridge((x * units).T @ (x * units), y.T @ (x * units), prior / units, damping)
    torch.testing.assert_close(scaled * units, found, rtol=1e-6, atol=1e-9)


def test_an_input_that_is_always_zero_keeps_its_weights():
    x, y, prior = data()
    x[:, 2] = 0.0
    found = ridge(x.T @ x, y.T @ x, prior, 0.1)
    torch.testing.assert_close(found[:, 2], prior[:, 2], rtol=1e-12, atol=0)
    assert not torch.equal(found, prior)


def rows_of(count, width, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_fewer_tokens_than_inputs_still_fits_and_stays_finite():
    x, y, prior = data(tokens=6)
    found = ridge(x.T @ x, y.T @ x, prior, 0.0)
    np.testing.assert_allclose((x @ found.T).numpy(), y.numpy(), atol=1e-4)
    assert torch.isfinite(found).all()


def test_what_cannot_be_solved_keeps_its_weights_with_a_warning(caplog):
    x, y, prior = data()
    gram = x.T @ x
    gram[0, 0] = torch.nan
    assert torch.equal(ridge(gram, y.T @ x, prior), prior)
    assert "keeps its weights" in caplog.text


def batches(count=6):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, SMALL["vocab_size"], (4, 16), generator=generator) for _ in range(count)]


@torch.no_grad()
def logits(model, data):
    return torch.cat([model(b).logits for b in data])


FAMILIES = {"llama": {}, "qwen2": {}, "llama-bias": {"attention_bias": True, "mlp_bias": True}}


@pytest.mark.parametrize("name", FAMILIES)
def test_repair_brings_the_pruned_model_nearer_to_the_dense_one(name):
    model = tiny(name.split("-")[0], **FAMILIES[name])
    group_sets = find_group_sets(model)
    plan = PruningPlan.from_kept(group_sets, uneven_kept(group_sets))
    wanted = logits(model, batches())
    before = {n: p.clone() for n, p in model.named_parameters()}
    weights = least_squares(model, group_sets, plan, batches(), model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert set(weights) == {p.parameter for s in group_sets for p in s.consumers}
    cut, repaired = tiny(name.split("-")[0], **FAMILIES[name]), model
    apply_plan(cut, plan)
    apply_plan(repaired, plan, weights=weights)
    error = [(logits(m, batches()) - wanted).square().mean() for m in (cut, repaired)]
    assert error[1] < 0.7 * error[0]


def test_the_first_consumer_is_the_ridge_solution_of_its_recorded_inputs():
    model = tiny("llama").double()
    group_sets = find_group_sets(model)
    kept = uneven_kept(group_sets)
    seen = []
    handle = model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda m, a, o: seen.append((a[0], o)))
    logits(model, batches())
    handle.remove()
    # a token counts for no more than one of three median lengths of its sequence
    lengths = [o.norm(dim=-1, keepdim=True) for _, o in seen]
    influence = [(3 * n.median(dim=1, keepdim=True).values / n).clamp(max=1) for n in lengths]
    x = torch.cat([(a * f).flatten(0, 1) for (a, _), f in zip(seen, influence, strict=True)])
    y = torch.cat([(o * f).flatten(0, 1) for (_, o), f in zip(seen, influence, strict=True)])
    attention = next(i for i, s in enumerate(group_sets) if s.kind == "attention")
    columns = group_sets[attention].consumers[0].index[kept[attention]].flatten()
    weights = least_squares(model, group_sets, PruningPlan.from_kept(group_sets, kept), batches(), model, damping=0.0)
    expected = np.linalg.lstsq(x[:, columns].numpy(), y.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(
        weights["model.layers.0.self_attn.o_proj.weight"].numpy(), expected, rtol=1e-6, atol=1e-8
    )


def test_where_nothing_was_removed_yet_it_is_the_identity():
    """The last MLP loses a channel: the attention before it sees dense inputs, and without damping gets its own weights."""
    model = tiny("llama").double()
    group_sets = find_group_sets(model)
    last = max(i for i, s in enumerate(group_sets) if s.kind == "mlp")
    kept = [list(range(s.size - (i == last))) for i, s in enumerate(group_sets)]
    weights = least_squares(model, group_sets, PruningPlan.from_kept(group_sets, kept), batches(), model, damping=0.0)
    assert set(weights) == {"model.layers.2.self_attn.o_proj.weight", "model.layers.2.mlp.down_proj.weight"}
    name = "model.layers.2.self_attn.o_proj.weight"
    torch.testing.assert_close(weights[name], model.get_parameter(name).detach(), rtol=1e-6, atol=1e-8)


EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 6, "attn": "eager"},
    "llama4_text": {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 20},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 12, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_lose_a_channel_that_others_have_and_compute_as_before(name):
    """The twin of a channel that leaves takes over its weights; which experts a token goes to stays."""
    model = tiny(name, **{"shared_expert_intermediate_size": 8, **EXPERTS[name]}).double()
    # the kernels for all experts at once know no float64
    model.config._experts_implementation = "eager"
    group_sets = find_group_sets(model)
    experts = [s for s in group_sets if s.name.endswith("experts") and s.kind == "mlp"]
    assert experts
    with torch.no_grad():
        for part in (part for s in experts for part in s.slices if not part.consumes):
            parameter = model.get_parameter(part.parameter)
            parameter.index_copy_(part.dim, part.index[1], parameter.index_select(part.dim, part.index[0]))
    kept = [[0, *range(2, s.size)] if s in experts else list(range(s.size)) for s in group_sets]
    plan = PruningPlan.from_kept(group_sets, kept)
    weights = least_squares(model, group_sets, plan, batches(), model, damping=0.0)
    assert {c.parameter for s in experts for c in s.consumers} <= weights.keys()
    expected = logits(model, batches())
    bare = copy.deepcopy(model)
    apply_plan(bare, plan)
    apply_plan(model, plan, weights=weights)
    assert float((logits(bare, batches()) - expected).abs().max()) > 1e-2 * float(expected.abs().max())
    torch.testing.assert_close(logits(model, batches()), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_experts_and_their_channels_are_refitted_together_by_closed_form():
    """The last layer loses an expert and channels: each other expert's weights are those of numpy's least squares."""
    model = tiny("mixtral", num_local_experts=4, num_experts_per_tok=2).double()
    model.config._experts_implementation = "eager"
    group_sets = find_group_sets(model)
    last = {s.kind: i for i, s in enumerate(group_sets) if s.layer == 2 and s.kind in ("mlp", "expert")}
    kept = [list(range(s.size)) for s in group_sets]
    kept[last["expert"]], kept[last["mlp"]] = [0, 1, 3], list(range(5, 24))
    plan = PruningPlan.from_kept(group_sets, kept)
    name = "model.layers.2.mlp.experts"
    weights = least_squares(model, group_sets, plan, batches(), model, damping=0.0)[f"{name}.down_proj"]
    fewer = copy.deepcopy(model)
    apply_plan(
        fewer,
        PruningPlan.from_kept(group_sets, [k if i != last["mlp"] else list(range(24)) for i, k in enumerate(kept)]),
    )
    experts, seen = fewer.get_submodule(name), []
    experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    logits(fewer, batches())
    for expert, down in enumerate(experts.down_proj.detach()):
        x = torch.cat([hidden[(index == expert).any(1)] for hidden, index, _ in seen])
        gate, up = (x @ experts.gate_up_proj[expert].detach().T).chunk(2, dim=-1)
        channels = torch.nn.functional.silu(gate) * up
        assert len(channels) > 24
        expected = np.linalg.lstsq(channels[:, 5:].numpy(), (channels @ down.T).numpy(), rcond=None)[0].T
        np.testing.assert_allclose(weights[expert].numpy(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_padding_does_not_count(name):
    model = tiny(name, **EXPERTS.get(name, {}))
    group_sets = find_group_sets(model)
    plan = PruningPlan.from_kept(group_sets, uneven_kept(group_sets))
    ids = torch.randint(0, SMALL["vocab_size"], (6, 16), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(ids)
    mask[:, 10:] = 0
    garbage = ids.clone()
    garbage[:, 10:] = 0
    results = [
        least_squares(model, group_sets, plan, [{"input_ids": i, "attention_mask": mask}], lambda b: model(**b))
        for i in (ids, garbage)
    ]
    assert any(key.endswith("experts.down_proj") for key in results[0]) == (name == "mixtral")
    for key in results[0]:
        torch.testing.assert_close(results[0][key], results[1][key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_folded_bias_makes_the_mean_output_of_the_first_consumer_that_of_the_dense_model(name):
    model = tiny(name)
    group_sets = find_group_sets(model)
    kept = uneven_kept(group_sets)
    plan = PruningPlan.from_kept(group_sets, kept)
    statistics = collect_statistics(model, group_sets, batches(), model, (), activations=True)
    folded, weights = bias_fold(model, group_sets, plan, statistics)
    means = []
    for step in range(2):
        seen = []
        handle = model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda m, a, o: seen.append(o))
        logits(model, batches())
        handle.remove()
        means.append(torch.cat(seen).flatten(0, 1).mean(0))
        if step == 0:
            apply_plan(model, folded, weights=weights)
    torch.testing.assert_close(means[1], means[0], rtol=1e-4, atol=1e-5)
    assert model.model.layers[0].self_attn.o_proj.bias.requires_grad
    again = tiny(name)
    apply_plan(again, PruningPlan.from_dict(folded.to_dict()))
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again, batches()), logits(model, batches()))


def test_what_others_cannot_explain_is_one_minus_the_squared_multiple_correlation():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 7, generator=generator, dtype=torch.float64)
    x[:, 0] = x[:, 1] - 2 * x[:, 2] + 0.1 * x[:, 0]
    weight = torch.randn(5, 7, generator=generator)
    single = unexplained_share(x.T @ x, weight, torch.arange(7).view(7, 1), 0.0)
    pairs = torch.tensor([[0, 3], [1, 4]])
    both = unexplained_share(x.T @ x, weight, pairs, 0.0)
    data = x.numpy()

    def left(columns):
        others = np.delete(data, columns, axis=1)
        fitted = others @ np.linalg.lstsq(others, data[:, columns], rcond=None)[0]
        give = weight.double().numpy()[:, columns].T
        return ((data[:, columns] - fitted) @ give, data[:, columns] @ give)

    for found, columns in (*zip(single, [[j] for j in range(7)], strict=True), *zip(both, pairs.tolist(), strict=True)):
        rest, whole = left(columns)
        assert float(found) == pytest.approx((rest**2).sum() / (whole**2).sum(), rel=1e-4)
    assert float(single[0]) < 0.01


def test_shares_of_wide_groups_with_several_threads():
    """Torch's inverse of several large matrices fails with more than one thread (pytorch issue 142815)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(800, 600, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 600, generator=generator)
    index = torch.arange(600).view(4, 150)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = unexplained_share(x.T @ x, weight, index, 0.0)
    finally:
        torch.set_num_threads(threads)
    gram = x.T.numpy() @ x.numpy()
    inverse = np.linalg.inv(gram)
    for share, columns in zip(found, index.tolist(), strict=True):
        give, block = weight.double().numpy()[:, columns], np.ix_(columns, columns)
        left = np.trace(give @ np.linalg.inv(inverse[block]) @ give.T)
        assert float(share) == pytest.approx(left / np.trace(give @ gram[block] @ give.T), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_shares_come_from_the_inputs_of_the_consumers(name):
    model = tiny(name)
    group_sets = find_group_sets(model)
    data = [torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    seen = {}
    handles = [
        model.get_submodule(s.consumers[0].module).register_forward_hook(
            lambda _, args, __, key=s.key: seen.setdefault(key, []).append(args[0].flatten(0, 1))
        )
        for s in group_sets
    ]
    with torch.no_grad():
        for batch in data:
            model(batch)
    for handle in handles:
        handle.remove()
    found = unexplained_shares(model, group_sets, data, model)
    assert found.keys() == {s.key for s in group_sets}
    for group_set in group_sets:
        (part,) = group_set.consumers
        x = torch.cat(seen[group_set.key])
        weight = model.get_parameter(part.parameter).movedim(part.dim, -1)
        damping = 0.1 * x.shape[1] / len(x)
        torch.testing.assert_close(
            found[group_set.key], unexplained_share(x.T @ x, weight, part.index, damping), rtol=1e-4, atol=1e-6
        )


def test_importance_is_discounted_by_what_the_repair_makes_up_for(batches, loss_of):
    model = tiny("llama")
    group_sets = find_group_sets(model)
    config = PruningConfig(importance="fisher")
    statistics = calibrate(model, group_sets, batches, loss_of(model), config)
    plain, _ = make_plan(model, group_sets, statistics, config)
    statistics.unexplained = unexplained_shares(model, group_sets, batches, loss_of(model))
    discounted, _ = make_plan(model, group_sets, statistics, config)
    shares = torch.cat([statistics.unexplained[s.key] for s in group_sets])
    np.testing.assert_allclose(discounted.importance, plain.importance * shares.sqrt().numpy(), rtol=1e-5)
