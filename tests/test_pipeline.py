"""From statistics to a plan: mixes, the automatic choice, uniform widths, masked models."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch

from conftest import tiny, uneven_kept, zeroed
from lit_prune import (
    BudgetError,
    CalibrationError,
    Limits,
    PruningConfig,
    PruningPlan,
    apply_plan,
    calibrate,
    find_group_sets,
    get_plan,
    make_plan,
    prune,
    repair,
)
from lit_prune.config import CANDIDATES
from lit_prune.ranking.candidates import masked, masked_loss
from lit_prune.ranking.importance import group_importance, mixed_importance
from lit_prune.ranking.model_table import model_size
from lit_prune.ranking.registry import get_criterion


def prune_config(**options) -> PruningConfig:
    return PruningConfig(**{"pruning_ratio": 0.2, **options})


def test_a_mix_is_the_weighted_sum_of_importances_that_each_sum_to_one(batches, loss_of):
    model = tiny("llama")
    group_sets = find_group_sets(model)
    config = prune_config(importance={"taylor": 0.7, "output_wanda": 0.3})
    statistics = calibrate(model, group_sets, batches, loss_of(model), config)
    table, plan = make_plan(model, group_sets, statistics, config)
    parameters = dict(model.named_parameters())
    expected = torch.zeros(len(table), dtype=torch.float64)
    for name, weight in config.importance.items():
        criterion = get_criterion(name)
        values = torch.cat(
            group_importance(criterion, parameters, group_sets, statistics, normalize=criterion.normalize)
        ).double()
        expected += weight * values / values.sum()
    torch.testing.assert_close(torch.from_numpy(table.importance), expected, rtol=1e-5, atol=1e-9)
    assert plan.info["importance"] == "taylor + output_wanda"


def test_bad_mixes_are_refused():
    for importance, message in (
        ({}, "positive weights"),
        ({"taylor": -1.0}, "positive weights"),
        ({"x": 1.0}, "importance must name criteria out of taylor, .*found 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_config(importance=importance)
    with pytest.raises(ValueError, match="positive sum"):
        mixed_importance([(1.0, [torch.tensor([-1.0, 1.0])])], find_group_sets(tiny())[:1])


def test_auto_takes_the_candidate_whose_masked_model_loses_least_on_held_back_batches(loss_of):
    model = tiny("llama")
    group_sets = find_group_sets(model)
    generator = torch.Generator().manual_seed(3)
    data = [torch.randint(0, 64, (2, 10), generator=generator) for _ in range(16)]
    config = prune_config(importance="auto")
    statistics = calibrate(model, group_sets, data, loss_of(model), config)
    assert statistics.batches == 14
    losses = {}

    def measure(plan):
        losses[plan.info["importance"]] = masked_loss(model, group_sets, plan, data, loss_of(model), config.holds_back)
        return losses[plan.info["importance"]]

    table, plan = make_plan(model, group_sets, statistics, config, measure=measure)
    assert set(losses) == set(CANDIDATES)
    assert plan.info["candidates"] == losses
    assert losses[plan.info["importance"]] == min(losses.values())
    kept = [k.tolist() for k in table.kept_groups()]
    oracle = zeroed(model, kept)
    with torch.no_grad():
        held = torch.stack([loss_of(oracle)(data[i]) for i in (7, 15)]).mean()
    assert losses[plan.info["importance"]] == pytest.approx(float(held), rel=1e-5)
    with pytest.raises(ValueError, match="needs a measure"):
        make_plan(model, group_sets, statistics, config)


def test_a_masked_model_is_put_back_also_after_an_error(tokens):
    model = tiny("qwen2")
    group_sets = find_group_sets(model)
    kept = uneven_kept(group_sets)
    plan = PruningPlan.from_kept(group_sets, kept)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError), masked(model, group_sets, plan):
        torch.testing.assert_close(model(tokens).logits, zeroed(model, kept)(tokens).logits, rtol=1e-4, atol=1e-5)
        raise RuntimeError
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("multiple", [1, 4])
def test_a_uniform_plan_keeps_one_width_and_fits_a_stock_config(multiple, batches, loss_of, tokens):
    model = tiny("llama")
    group_sets = find_group_sets(model)
    limits = Limits(uniform=True, multiple_of={"mlp": multiple} if multiple > 1 else {})
    config = prune_config(importance="taylor", pruning_ratio=0.3, limits=limits)
    statistics = calibrate(model, group_sets, batches, loss_of(model), config)
    table, plan = make_plan(model, group_sets, statistics, config)
    widths = {
        kind: {len(k) for s, k in zip(group_sets, table.kept_groups(), strict=True) if s.kind == kind}
        for kind in ("attention", "mlp")
    }
    assert all(len(w) == 1 for w in widths.values())
    (heads,), (channels,) = widths["attention"], widths["mlp"]
    assert channels % multiple == 0
    assert (
        0 <= config.budget_of_parameters(model, group_sets) - table.removed_cost < 3 * max(s.cost for s in group_sets)
    )
    apply_plan(model, plan)
    stock = tiny(
        "llama", num_key_value_heads=heads, num_attention_heads=2 * heads, intermediate_size=channels, head_dim=4
    )
    stock.load_state_dict(model.state_dict())
    torch.testing.assert_close(stock(tokens).logits, model(tokens).logits)


def test_uniform_needs_sets_of_one_size(batches, loss_of):
    model = tiny("llama")
    group_sets = find_group_sets(model)
    apply_plan(model, PruningPlan.from_kept(group_sets, uneven_kept(group_sets)))
    with pytest.raises(BudgetError, match="of one size"):
        prune_config(limits=Limits(uniform=True, min_fraction=0)).check(model, find_group_sets(model))


def test_output_side_criteria_equal_the_published_formulas(batches, loss_of):
    model = tiny("llama")
    group_sets = find_group_sets(model)
    seen = {}
    for s in group_sets:
        module = model.get_submodule(s.consumers[0].module)
        module.register_forward_pre_hook(
            lambda m, a, n=s.name: seen.setdefault(n, []).append(a[0].detach().flatten(0, 1))
        )
    config = prune_config(importance={"output_wanda": 1.0, "flap": 1.0}, normalize=None)
    statistics = calibrate(model, group_sets, batches, loss_of(model), config)
    parameters = dict(model.named_parameters())
    found = {
        name: group_importance(get_criterion(name), parameters, group_sets, statistics, normalize=None)
        for name in config.importance
    }
    for position, s in enumerate(group_sets):
        x = torch.cat(seen[s.name]).double()
        weight = model.get_parameter(s.consumers[0].parameter).detach().double()
        columns = s.consumers[0].index
        output = (weight.norm(dim=0) * x.norm(dim=0))[columns].sum(1)
        flap = (weight.square().sum(0) * x.var(dim=0, unbiased=False))[columns].sum(1)
        torch.testing.assert_close(found["output_wanda"][position], output.float(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["flap"][position], flap.float(), rtol=1e-4, atol=1e-6)
    standard = group_importance(get_criterion("flap"), parameters, group_sets, statistics, normalize="standard")
    for s, importance in zip(group_sets, standard, strict=True):
        score = importance / s.cost
        assert float(score.mean()) == pytest.approx(0, abs=1e-4)
        assert float(score.std(unbiased=False)) == pytest.approx(1, abs=1e-3)


def test_blocks_that_cannot_be_replayed_are_repaired_in_the_order_in_which_they_run(batches, loss_of, recwarn):
    model = tiny("llama")
    group_sets = find_group_sets(model)
    plan = PruningPlan.from_kept(group_sets, uneven_kept(group_sets))
    statistics = calibrate(model, group_sets, batches, loss_of(model), prune_config())
    # what the second layer reads is not what the first one gave
    model.model.layers[1].register_forward_pre_hook(
        lambda m, args, kwargs: ((args[0] * 2, *args[1:]), kwargs), with_kwargs=True, prepend=True
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    wanted = torch.cat([model(b).logits for b in batches])
    same, weights = repair(model, group_sets, plan, statistics, batches, model, prune_config())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not [w for w in recwarn if "repaired" in str(w.message)]
    assert same is plan
    assert set(weights) == {p.parameter for s in group_sets for p in s.consumers}
    errors = []
    for new in ({}, weights):
        model.load_state_dict(before, strict=False)
        smaller = copy.deepcopy(model)
        apply_plan(smaller, plan, weights=new)
        errors.append(float((torch.cat([smaller(b).logits for b in batches]) - wanted).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def snapshot(model, optimizer):
    state = {
        n: {k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()
    }
    return {n: p.detach().clone() for n, p in model.named_parameters()}, state


def trained(batches, loss_of):
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_of(model)(batches[0]).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def test_iterations_are_cuts_one_after_the_other(batches, loss_of):
    config = prune_config(importance="fisher", pruning_ratio=0.3, iterations=1)
    at_once, optimizer = trained(batches, loss_of)
    table, plan = prune(at_once, batches, loss_of(at_once), replace(config, iterations=2), [optimizer])
    by_hand, other = trained(batches, loss_of)
    size = model_size(by_hand, find_group_sets(by_hand))
    for ratio in (0.15, 0.3):
        prune(by_hand, batches, loss_of(by_hand), replace(config, pruning_ratio=ratio, reference=size), [other])
    assert plan.digest() == get_plan(at_once).digest() == get_plan(by_hand).digest()
    assert plan.info["iterations"] == 2
    assert plan.info["parameters_before"] == size[0]
    assert plan.info["parameters_after"] == sum(p.numel() for p in at_once.parameters()) < 0.75 * size[0]
    assert table.removed_cost == size[0] - plan.info["parameters_after"]
    whole = PruningPlan.from_kept(find_group_sets(tiny("llama")), table.kept_groups())
    assert whole.digest() == plan.digest()
    for (name, a), (_, b) in zip(at_once.named_parameters(), by_hand.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(optimizer.state[a]["exp_avg"], other.state[b]["exp_avg"])
    once, _ = trained(batches, loss_of)
    assert prune(once, batches, loss_of(once), config)[1].digest() != plan.digest()


@pytest.mark.parametrize(
    ("ratio", "asked", "cuts"),
    [(0.05, None, 1), (0.2, None, 1), (0.21, None, 2), (0.5, None, 3), (0.5, 1, 1), (0.1, 4, 4)],
)
def test_without_a_number_a_cut_removes_a_fifth_at_most(ratio, asked, cuts):
    model = tiny()
    config = PruningConfig(pruning_ratio=ratio, iterations=asked)
    ratios = [step.pruning_ratio for step in config.steps(model, find_group_sets(model))]
    assert ratios == pytest.approx([ratio * (k + 1) / cuts for k in range(cuts)])


def test_what_is_gone_already_needs_no_cut_of_its_own(batches, loss_of):
    model = tiny()
    before = sum(p.numel() for p in model.parameters())
    reference = (before, sum(s.size * s.cost for s in find_group_sets(model)))
    prune(model, batches, loss_of(model), PruningConfig(pruning_ratio=0.3, importance="magnitude", repair=None))
    for ratio, cuts in ((0.45, 1), (0.6, 2)):
        steps = PruningConfig(pruning_ratio=ratio, reference=reference).steps(model, find_group_sets(model))
        assert len(steps) == cuts and steps[-1].pruning_ratio == ratio


def test_trade_offs_that_are_read_after_the_cuts_are_those_of_the_dense_model(batches, loss_of):
    model, size = tiny("llama"), sum(p.numel() for p in tiny("llama").parameters())
    config = prune_config(importance="magnitude", pruning_ratio=0.4)
    table, _ = prune(model, batches, loss_of(model), config)
    copied = pickle.loads(pickle.dumps(table))
    points = table.trade_offs["params"]
    assert points[0] == {"params": size, "importance": 0}
    assert copied.trade_offs == table.trade_offs
    dense, group_sets = tiny("llama"), find_group_sets(tiny("llama"))
    for point in points[1:]:
        ratio = (size - point["params"] + 0.5) / size
        planned, plan = make_plan(dense, group_sets, None, replace(config, pruning_ratio=ratio, iterations=1))
        assert plan.info["parameters_after"] == point["params"]
        assert planned.importance[~planned.kept].sum() == pytest.approx(point["importance"])


def test_more_iterations_than_groups_leave_what_one_leaves(batches, loss_of):
    model = tiny("llama")
    total = model_size(model, find_group_sets(model))[0]
    config = prune_config(importance="magnitude", pruning_ratio=0.02, iterations=50)
    _, plan = prune(model, batches, loss_of(model), config)
    assert 0.015 * total < total - plan.info["parameters_after"] <= 0.02 * total


def test_an_error_in_a_later_iteration_leaves_everything_as_it_was(batches, loss_of):
    model, optimizer = trained(batches, loss_of)
    weights, state = snapshot(model, optimizer)
    kept = list(model.parameters())
    size = sum(p.numel() for p in kept)

    def failing(batch):
        loss = loss_of(model)(batch)
        return loss if sum(p.numel() for p in model.parameters()) == size else loss * float("nan")

    config = prune_config(importance="taylor", pruning_ratio=0.3, iterations=2)
    with pytest.raises(CalibrationError, match="nan"):
        prune(model, batches, failing, config, [optimizer])
    assert get_plan(model) is None
    assert all(a is b for a, b in zip(model.parameters(), kept, strict=True))
    again, state_again = snapshot(model, optimizer)
    assert all(torch.equal(again[n], weights[n]) for n in weights)
    assert all(torch.equal(state_again[n][k], state[n][k]) for n in state for k in state[n])
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in kept}
    with pytest.raises(ValueError, match="iterations must be an integer from 1 to 10,000, or None; found 0"):
        prune_config(iterations=0)


def test_baselines_are_not_discounted(batches, loss_of):
    config = prune_config(importance="random", pruning_ratio=0.3, iterations=1)
    model = tiny("llama")
    table, _ = prune(model, batches, loss_of(model), config)
    dense = tiny("llama")
    plain, _ = make_plan(dense, find_group_sets(dense), None, config)
    assert (table.importance == plain.importance).all()
