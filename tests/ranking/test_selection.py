"""The table, the selection under limits, and the plan."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from conftest import tiny
from lit_prune import BudgetError, CalibrationError, GroupTable, Limits, PlanError, PruningPlan, find_group_sets
from lit_prune.plan import PlanEntry
from lit_prune.ranking.selection import parameter_budget, select

pytestmark = pytest.mark.core


def table_of(*sets: tuple[str, int, list[float]], layers=None) -> GroupTable:
    """A table from (kind, cost, importances) of each set."""
    sizes = [len(s[2]) for s in sets]
    return GroupTable(
        keys=tuple((f"layers.{i}.{kind}", kind) for i, (kind, _, _) in enumerate(sets)),
        layers=np.array(layers or list(range(len(sets)))),
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
        importance=np.concatenate([np.array(s[2], dtype=float) for s in sets]),
        cost=np.repeat([s[1] for s in sets], sizes),
        kept=np.ones(sum(sizes), dtype=bool),
    )


def random_table(seed: int) -> GroupTable:
    generator = np.random.default_rng(seed)
    return table_of(
        *[("attention", 40, generator.random(4).tolist()) for _ in range(3)],
        *[("mlp", 3, (generator.random(20) / 10).tolist()) for _ in range(3)],
        layers=[0, 1, 2, 0, 1, 2],
    )


def test_the_lowest_scores_leave_first():
    table = table_of(("attention", 10, [1.0, 50.0]), ("mlp", 1, [0.2, 0.05, 9.0, 0.01]))
    kept = select(table, 12, Limits(min_fraction=0))
    assert kept.tolist() == [False, True, True, False, True, False]


@pytest.mark.parametrize("seed", range(5))
def test_the_budget_is_reached_within_one_group(seed):
    table = random_table(seed)
    for budget in range(3, 280, 13):
        table.kept = select(table, budget, Limits(min_fraction=0))
        assert 0 <= budget - table.removed_cost < 3
        assert all(len(k) >= 1 for k in table.kept_groups())


@pytest.mark.parametrize("seed", range(5))
def test_no_single_exchange_at_equal_cost_lowers_the_importance_lost(seed):
    """Within a kind costs are equal, so an optimal choice never keeps a lower score than one it removes there."""
    table = random_table(seed)
    kept = select(table, 150, Limits(min_groups=0, min_fraction=0))
    kinds = np.array([kind for _, kind in table.keys])[table.set_of_row]
    for kind in ("attention", "mlp"):
        rows = kinds == kind
        assert table.score[rows & ~kept].max() <= table.score[rows & kept].min()


def test_floors_protection_and_kinds_hold():
    table = random_table(0)
    limits = Limits(min_groups=2, min_fraction=0.35, protect=(0, r"layers\.4"))
    table.kept = select(table, 150, limits)
    for (name, kind), layer, groups, size in zip(
        table.keys, table.layers, table.kept_groups(), table.sizes, strict=True
    ):
        if layer == 0 or name == "layers.4.mlp":
            assert len(groups) == size
        else:
            assert len(groups) >= (2 if kind == "attention" else 7)
    table.kept = select(table, 60, Limits(kinds=("mlp",)))
    assert {table.keys[i][1] for i in table.set_of_row[~table.kept]} == {"mlp"}
    last = select(table, 30, Limits(protect=(-1, -2)))
    assert set(table.layers[table.set_of_row[~last]]) == {0}


@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_rounded_widths_are_multiples_and_the_best_channels_stay(multiple):
    table = random_table(3)
    table.kept = select(table, 100, Limits(min_fraction=0, multiple_of={"mlp": multiple}))
    for (_, kind), groups, start, size in zip(
        table.keys, table.kept_groups(), table.offsets[:-1], table.sizes, strict=True
    ):
        if kind == "mlp":
            assert len(groups) in {size, *range(multiple, size, multiple)}
            scores = table.score[start : start + size]
            gone = np.setdiff1d(np.arange(size), groups)
            assert not len(gone) or scores[gone].max() <= scores[groups].min()
    assert 0 <= 100 - table.removed_cost < 3 * multiple


def test_wide_sets_keep_widths_that_multiply_fast_unless_told_otherwise():
    generator = np.random.default_rng(0)
    table = table_of(*[("mlp", 3, generator.random(size)) for size in (3072, 1536, 1535, 767, 383)])
    table.kept = select(table, 3000)
    assert [len(groups) % n for groups, n in zip(table.kept_groups(), (64, 32, 16, 8, 1), strict=True)] == [0] * 5
    assert 3000 - table.removed_cost < 3
    # what was wide before an earlier cut is still rounded
    table.kept = select(table, 3000, Limits(), dict.fromkeys(table.keys, 1536))
    assert [len(groups) % 32 for groups in table.kept_groups()] == [0] * 5
    table.kept = select(table, 3000, Limits(multiple_of={}))
    assert sum(len(groups) % 8 > 0 for groups in table.kept_groups()) > 1
    assert 3000 - table.removed_cost < 3


def test_small_cases_match_an_exhaustive_search_of_prefixes():
    """With floors, what leaves must be the cheapest set of in-set prefixes in score order."""
    table = table_of(("a", 2, [0.1, 0.4, 0.9]), ("b", 2, [0.2, 0.3, 0.8]))
    kept = select(table, 6, Limits(min_groups=1, min_fraction=0))
    best = min(
        (sum(table.importance[r] for r in (*a, *b)), sorted((*a, *b)))
        for i, j in itertools.product(range(3), repeat=2)
        for a, b in [((0, 1, 2)[:i], (3, 4, 5)[:j])]
        if 2 * (i + j) == 6
    )
    assert np.flatnonzero(~kept).tolist() == best[1]


def test_what_cannot_be_reached_is_said():
    table = random_table(0)
    with pytest.raises(BudgetError, match=r"remove 500 parameters, but only .* min_fraction=0.5"):
        select(table, 500, Limits(min_fraction=0.5))
    with pytest.raises(BudgetError, match="less than the smallest"):
        select(table, 1, Limits())
    for arguments in ({"min_groups": -1}, {"min_fraction": 2.0}, {"multiple_of": {"mlp": 0}}):
        with pytest.raises(ValueError, match="found"):
            Limits(**arguments)


def test_the_ratio_is_of_all_or_of_the_prunable_parameters():
    assert parameter_budget(0.2, "all", 1000, 500) == 200
    assert parameter_budget(0.2, "prunable", 1000, 500) == 100


def test_a_million_rows_are_selected_in_seconds():
    generator = np.random.default_rng(0)
    table = table_of(*[("mlp", 3, generator.random(28672)) for _ in range(40)])
    table.kept = select(table, 600_000, Limits(multiple_of={"mlp": 64}))
    assert 600_000 - table.removed_cost < 3 * 64


def test_the_table_survives_csv_and_parquet(tmp_path):
    model = tiny("llama")
    group_sets = find_group_sets(model)
    generator = torch.Generator().manual_seed(0)
    table = GroupTable.build(group_sets, [torch.rand(s.size, generator=generator) for s in group_sets])
    table.kept = select(table, 2000)
    table.to_csv(tmp_path / "t.csv")
    table.to_parquet(tmp_path / "t.parquet")
    for path in ("t.csv", "t.parquet"):
        again = GroupTable.read(tmp_path / path)
        assert again.keys == table.keys
        for name in ("layers", "offsets", "importance", "cost", "kept", "score", "group"):
            assert np.array_equal(getattr(again, name), getattr(table, name)), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.csv", "t.parquet"]


def test_an_importance_that_is_not_finite_is_named():
    group_sets = find_group_sets(tiny("llama"))
    importance = [torch.ones(s.size) for s in group_sets]
    importance[1][3] = torch.nan
    with pytest.raises(CalibrationError, match=f"group 3 of '{group_sets[1].name}'"):
        GroupTable.build(group_sets, importance)


# the plan


def plan_of(*kept: list[int], size: int = 6) -> PruningPlan:
    return PruningPlan(tuple(PlanEntry(f"layers.{i}.mlp", "mlp", i, size, tuple(k)) for i, k in enumerate(kept)))


def test_a_plan_survives_json_and_its_digest_is_of_the_cut_alone(tmp_path):
    plan = plan_of([0, 2, 5], [1])
    plan.save(tmp_path / "plan.json")
    again = PruningPlan.load(tmp_path / "plan.json")
    assert again == plan and again.digest() == plan.digest()
    noted = PruningPlan(plan.entries, info={"importance": "taylor"})
    assert noted.digest() == plan.digest()
    assert plan_of([0, 2, 4], [1]).digest() != plan.digest()


def test_plans_compose_against_the_original():
    first, second = plan_of([0, 2, 3, 5], [1, 4]), PruningPlan((PlanEntry("layers.0.mlp", "mlp", 0, 4, (1, 3)),))
    assert first.compose(second).entries == plan_of([2, 5], [1, 4]).entries
    with pytest.raises(PlanError, match="keeps 2 groups in the first plan, and the second was made for 4"):
        plan_of([0, 1]).compose(second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "expected a mapping with format"),
        ({"version": 9}, "version 9"),
        ({"group_sets": [{"name": "a"}]}, "malformed"),
        ({"group_sets": 3}, "malformed"),
        ({"group_sets": [{"name": "a", "kind": "mlp", "layer": 0, "size": 2, "kept": [0, 2]}]}, "within 0..1"),
        ({"group_sets": [{"name": "a", "kind": "mlp", "layer": 0, "size": 4, "kept": [2, 1]}]}, "ascending"),
        ({"group_sets": [{"name": "a", "kind": "mlp", "layer": 0, "size": 4, "kept": [0.5]}]}, "malformed"),
        ({"group_sets": 2 * [{"name": "a", "kind": "mlp", "layer": 0, "size": 4, "kept": [0]}]}, "twice"),
    ],
)
def test_a_malformed_plan_is_refused(tmp_path, change, message):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**plan_of([0]).to_dict(), **change}))
    with pytest.raises(PlanError, match=message):
        PruningPlan.load(path)
    path.write_text("{")
    with pytest.raises(PlanError, match="not a pruning plan"):
        PruningPlan.load(path)
