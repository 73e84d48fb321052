"""What every architecture has to pass. A new one is added to ``CASES`` in architecture_cases.py and nowhere else.

``tools/conformance.py`` runs this file and writes docs/conformance.md: a column for every test function here.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from math import lcm

import pytest
import torch
from architecture_cases import CASES, Case, loss_of, output_of

from conftest import skipping, uneven_kept
from lit_prune import (
    Limits,
    PlanError,
    PruningConfig,
    PruningPlan,
    UnsupportedModelError,
    apply_plan,
    calibrate,
    find_group_sets,
    find_model,
    get_plan,
    make_plan,
    repair,
)
from lit_prune.calibration.collect import collect_statistics
from lit_prune.groups import BLOCK
from lit_prune.io.huggingface import load_pruned, save_pruned
from lit_prune.ranking.importance import group_importance
from lit_prune.ranking.registry import get_criterion

every_case = pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.slow else []) for c in CASES]
)


def plan_of(model, kept=None) -> PruningPlan:
    group_sets = find_group_sets(model)
    return PruningPlan.from_kept(group_sets, uneven_kept(group_sets) if kept is None else kept)


def pruned(case: Case, attention: str | None = None):
    model = case.build(attention)
    apply_plan(model, plan_of(model))
    return model


def count(model) -> int:
    return sum(p.numel() for p in model.parameters())


def assert_close(found, expected, precision=1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=precision, atol=precision * max(1.0, float(expected.abs().max())))


def assert_computes_as_the_dense_model(case: Case, model, group_sets, kept, attention=None, seeds=(0, 1)) -> None:
    with torch.no_grad(), case.oracle(case.build(attention), group_sets, kept) as oracle:
        expected = [output_of(oracle, case.batch(seed)) for seed in seeds]
    with torch.no_grad():
        for seed, wanted in zip(seeds, expected, strict=True):
            assert_close(output_of(model, case.batch(seed)), wanted)


@every_case
def test_equals_zeroed_dense_model(case):
    for attention in case.attentions:
        model = case.build(attention)
        group_sets = find_group_sets(model)
        assert {s.kind for s in group_sets} == set(case.kinds)
        kept = uneven_kept(group_sets)
        with torch.no_grad():
            dense = output_of(model, case.batch(0))
        apply_plan(model, PruningPlan.from_kept(group_sets, kept))
        with torch.no_grad():
            assert float((output_of(model, case.batch(0)) - dense).abs().max()) > 1e-3 * float(dense.abs().max())
        assert_computes_as_the_dense_model(case, model, group_sets, kept, attention)


@every_case
def test_counts(case):
    """Costs are what leaves: of one group by itself, and of a whole plan."""
    dense = case.build()
    for position, group_set in enumerate(find_group_sets(dense)):
        model = case.build()
        kept = [list(range(s.size)) for s in find_group_sets(model)]
        removed = group_set.removed_with(group_set.size // 2)
        kept[position] = [g for g in kept[position] if g not in removed]
        if len(kept[position]) < group_set.minimum:
            continue
        apply_plan(model, plan_of(model, kept))
        assert count(dense) - count(model) == group_set.cost * len(removed), group_set.name
    group_sets = find_group_sets(dense)
    config = PruningConfig("magnitude", 0.2, ratio_of="prunable", limits=Limits(min_fraction=0))
    inner = find_model(dense)[1]
    before, budget = count(inner), config.budget_of_parameters(inner, group_sets)
    _, plan = make_plan(inner, group_sets, None, config)
    apply_plan(dense, plan)
    assert plan.info["parameters_before"] == before
    assert plan.info["parameters_after"] == count(inner)
    assert 0 <= budget - (before - count(inner)) < max(s.cost * lcm(s.equal_parts, s.multiple_of) for s in group_sets)


@every_case
def test_generates_with_cache(case):
    if not case.generates:
        pytest.skip("does not generate")
    model = pruned(case)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = case.batch(3)["input_ids"]
    with_cache = model.generate(ids, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options))
    assert with_cache.shape[1] >= 6


@every_case
def test_survives_saving(case, tmp_path):
    model = pruned(case)
    if case.saves:
        save_pruned(model, tmp_path / "model")
        loaded = load_pruned(tmp_path / "model")
        if loaded.config._attn_implementation != model.config._attn_implementation:
            loaded.set_attn_implementation(model.config._attn_implementation)
    else:
        loaded = case.build()
        apply_plan(loaded, PruningPlan.from_dict(get_plan(find_model(model)[1]).to_dict()))
        loaded.load_state_dict(model.state_dict())
    batch = case.batch(0)
    with torch.no_grad():
        assert torch.equal(output_of(loaded, batch), output_of(model, batch))
    assert [s.size for s in find_group_sets(loaded)] == [s.size for s in find_group_sets(model)]


@every_case
def test_trains(case):
    """Two steps of AdamW, its state carried through the cut, are those of the zeroed dense model."""
    model = case.build().train()
    # with the default eps, gradients that are zero but for rounding would become steps of a size of their own
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)

    def step(network, optimizer, seed, frozen=()):
        optimizer.zero_grad()
        loss = loss_of(network, case.batch(seed))
        loss.backward()
        for part, groups in frozen:
            gradient = find_model(network)[1].get_parameter(part.parameter).grad
            gradient.index_fill_(part.dim, part.index[groups].flatten(), 0.0)
        optimizer.step()
        return loss.detach()

    step(model, optimizer, 0)
    group_sets = find_group_sets(model)
    kept = uneven_kept(group_sets)
    with case.oracle(model, group_sets, kept) as oracle:
        other = torch.optim.AdamW(oracle.parameters(), lr=1e-3, eps=1e-3)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for state in other.state.values():
            state["exp_avg"].zero_()
        # where keys and values stay, zeroed columns would have gradients
        frozen = [(part, s.kept_to_removed(k)) for s, k in zip(group_sets, kept, strict=True) for part in s.slices]
        expected = [step(oracle, other, seed, frozen) for seed in (1, 2)]
        with torch.no_grad():
            wanted = output_of(oracle.eval(), case.batch(0))
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
    stepped = len(optimizer.state)
    apply_plan(model, PruningPlan.from_kept(group_sets, kept), [optimizer])
    assert len(optimizer.state.keys() & set(model.parameters())) == len(optimizer.state) == stepped
    found = [step(model, optimizer, seed) for seed in (1, 2)]
    assert_close(torch.stack(found), torch.stack(expected), 1e-4)
    with torch.no_grad():
        assert_close(output_of(model.eval(), case.batch(0)), wanted, 1e-3)


@every_case
def test_importance_is_that_of_autograd(case):
    """Put abs(θ·g) of plain autograd in the place of the weights: what a cut then takes away is the group's importance."""
    model = case.build()
    inner = find_model(model)[1]
    group_sets = find_group_sets(model)
    criterion = get_criterion("taylor")
    batches = [case.batch(0), case.batch(1)]
    statistics = collect_statistics(
        inner, group_sets, batches, lambda b: loss_of(model, b), criterion.terms, root=model
    )
    parameters = dict(inner.named_parameters(remove_duplicate=False))
    importance = group_importance(criterion, parameters, group_sets, statistics)
    torch.stack([loss_of(model, b) for b in batches]).mean().backward()
    for parameter in model.parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.data = (parameter.data * gradient).abs()
        parameter.grad = None
    total = sum(float(p.detach().double().sum()) for p in model.parameters())
    for position in {0, 1, len(group_sets) // 2, len(group_sets) - 1} & set(range(len(group_sets))):
        group = group_sets[position].size - 1
        kept = [list(range(s.size)) for s in group_sets]
        removed = group_sets[position].removed_with(group)
        kept[position] = [g for g in kept[position] if g not in removed]
        if len(kept[position]) < group_sets[position].minimum:
            continue
        smaller = copy.deepcopy(model)
        apply_plan(smaller, plan_of(smaller, kept))
        taken = total - sum(float(p.detach().double().sum()) for p in smaller.parameters())
        assert float(importance[position][list(removed)].sum()) == pytest.approx(taken, rel=1e-4, abs=1e-6 * total)


@every_case
def test_is_pruned_again(case):
    """Two cuts are one cut by the composed plan, and the second one's limits still hold."""
    model, once = case.build(), case.build()
    for _ in range(2):
        apply_plan(model, plan_of(model))
    plan = get_plan(find_model(model)[1])
    apply_plan(once, plan)
    assert get_plan(find_model(once)[1]).digest() == plan.digest()
    batch = case.batch(0)
    with torch.no_grad():
        assert torch.equal(output_of(model, batch), output_of(once, batch))


@every_case
def test_loses_whole_layers(case):
    """Sets that may lose everything do; the others say how many groups have to stay, and a plan against that is refused."""
    model = case.build()
    group_sets = find_group_sets(model)
    refusing = [s for s in group_sets if s.minimum]
    for group_set in refusing[:1]:
        kept = [list(range(group_set.minimum - 1)) if s is group_set else list(range(s.size)) for s in group_sets]
        with pytest.raises(PlanError, match=f"runs with {group_set.minimum} or more"):
            apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    if all(s.minimum for s in group_sets):
        pytest.skip("keeps a group of every set")
    # the first layer goes whole, as caches and masks ask it for their length; then one branch of each of the others
    layers = sorted({s.layer for s in group_sets})
    kept = []
    for s in group_sets:
        gone = s.minimum == 0 and (s.layer == layers[0] or (s.layer + (s.kind == "mlp")) % 2 == 0)
        kept.append([] if gone else list(range(s.size)))
    apply_plan(model, PruningPlan.from_kept(group_sets, kept))
    assert {s.key for s in find_group_sets(model)} == {s.key for s, k in zip(group_sets, kept, strict=True) if k}
    assert_computes_as_the_dense_model(case, model, group_sets, kept)
    model.train()
    loss_of(model, case.batch(0)).backward()
    model.eval()
    if case.generates:
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        ids = case.batch(3)["input_ids"]
        with_cache = model.generate(ids, use_cache=True, **options)
        assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options))


@every_case
def test_is_repaired(case):
    """Calibration, plan, repair and cut as a user runs them, once by gradients and once by activations."""
    for importance, method in (("taylor_2nd", "least_squares"), ("wanda", "bias")):
        model = case.build()
        inner = find_model(model)[1]
        group_sets = find_group_sets(model)
        batches = [case.batch(seed) for seed in range(4)]
        with torch.no_grad():
            dense = torch.cat([output_of(model, b).flatten() for b in batches])
        config = PruningConfig(importance, 0.3, ratio_of="prunable", repair=method)
        run = partial(loss_of, model)
        statistics = calibrate(inner, group_sets, batches, run, config, root=model)
        _, plan = make_plan(inner, group_sets, statistics, config)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            plan, weights = repair(inner, group_sets, plan, statistics, batches, run, config, root=model)
        assert not [w for w in warned if "Nothing was repaired" in str(w.message)] or not case.refits
        errors = []
        for new in ({}, weights):
            cut = copy.deepcopy(model)
            apply_plan(cut, plan, weights=new)
            with torch.no_grad():
                errors.append(
                    float((torch.cat([output_of(cut, b).flatten() for b in batches]) - dense).square().mean())
                )
        if method == "bias" or case.refits:
            assert weights
            assert errors[1] < errors[0] * (1 if method == "least_squares" else 2)
        else:
            assert not weights


@every_case
def test_loses_blocks(case, tmp_path):
    """The first block of every list leaves: as if the dense model passed it over, in caches, in files, and in counts."""
    model = case.build()
    if not case.blocks:
        with pytest.raises(UnsupportedModelError, match="Whole blocks cannot be removed"):
            find_group_sets(model, blocks=True)
        pytest.skip("no block can be removed")
    group_sets, inner = find_group_sets(model, blocks=True), find_model(model)[1]
    gone = [s.kind == BLOCK and s.layer == 0 for s in group_sets]
    plan = PruningPlan.from_kept(
        group_sets, [[] if g else range(s.size) for g, s in zip(gone, group_sets, strict=True)]
    )
    oracle, before = skipping(case.build(), plan.removed_blocks), count(model)
    apply_plan(model, plan)
    assert before - count(model) == sum(s.cost for g, s in zip(gone, group_sets, strict=True) if g)
    batch = case.batch(0)
    with torch.no_grad():
        assert_close(output_of(model, batch), output_of(oracle, batch))
    if case.generates:
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        ids = case.batch(3)["input_ids"]
        cached = model.generate(ids, use_cache=True, **options)
        assert torch.equal(cached, oracle.generate(ids, use_cache=False, **options))
    if case.saves:
        save_pruned(model, tmp_path / "model")
        loaded = load_pruned(tmp_path / "model")
        loaded.set_attn_implementation(model.config._attn_implementation)
        with torch.no_grad():
            assert torch.equal(output_of(loaded, batch), output_of(model, batch))
        assert get_plan(loaded) == get_plan(inner)
