"""Selection under several limits: all are met, nothing leaves that need not, and little is lost against the best choice."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import numpy as np
import pytest

from lit_prune import BudgetError, GroupTable, Limits
from lit_prune.budgets.resources import Resource
from lit_prune.errors import SmallBudgetError
from lit_prune.ranking.budget_selection import check_budgets, select_for_budgets, trade_off


@dataclass(eq=False)
class Sum:
    """So much for every group of each set."""

    per_group: np.ndarray

    def value(self, kept):
        return float((self.per_group * kept).sum())

    def saved(self, kept):
        return self.per_group


@dataclass(eq=False)
class Product:
    """The product of the widths of two sets."""

    def value(self, kept):
        return float(kept[0] * kept[1])

    def saved(self, kept):
        return kept[::-1].astype(float)


def table_of(*importances) -> GroupTable:
    sizes = np.array([len(i) for i in importances])
    return GroupTable(
        keys=tuple((f"layers.{i}.part", "mlp") for i in range(len(sizes))),
        layers=np.arange(len(sizes)),
        offsets=np.concatenate([[0], sizes.cumsum()]),
        importance=np.concatenate([np.array(i, dtype=float) for i in importances]),
        cost=np.ones(sizes.sum(), dtype=np.int64),
        kept=np.ones(sizes.sum(), dtype=bool),
    )


def best_loss(table, resources) -> float:
    """The least importance that any choice loses that meets all limits; of each set the least important groups leave."""
    orders = [np.sort(i) for i in np.split(table.importance, table.offsets[1:-1])]
    best = np.inf
    for removed in itertools.product(*(range(len(o)) for o in orders)):
        kept = table.sizes - np.array(removed)
        if all(r.quantity.value(kept) <= r.target for r in resources):
            best = min(best, sum(o[:n].sum() for o, n in zip(orders, removed, strict=True)))
    return best


LOOSE = Limits(min_fraction=0, multiple_of={})


@pytest.mark.parametrize("seed", range(12))
def test_all_limits_are_met_and_little_is_lost_against_every_other_choice(seed):
    generator = np.random.default_rng(seed)
    table = table_of(*(generator.random(n) for n in (8, 9, 7, 6)))
    resources = []
    for name, fraction in zip(("flops", "memory", "params"), generator.uniform(0.45, 0.85, 3), strict=True):
        quantity = Sum(generator.uniform(1, 5, 4))
        resources.append(Resource(name, quantity, fraction * quantity.value(table.sizes)))
    choice = select_for_budgets(table, resources, LOOSE)
    kept = np.array([part.sum() for part in np.split(choice.kept, table.offsets[1:-1])])
    for resource in resources:
        assert choice.values[resource.name] == resource.quantity.value(kept) <= resource.target
    # nothing leaves that could stay
    for number in range(len(kept)):
        if kept[number] < table.sizes[number]:
            more = kept + (np.arange(len(kept)) == number)
            assert any(r.quantity.value(more) > r.target for r in resources)
    assert choice.importance == pytest.approx(table.importance[~choice.kept].sum())
    assert choice.importance <= 1.35 * best_loss(table, resources) + 1e-12


def test_shared_weights_are_charged_as_they_are_at_the_cut():
    generator = np.random.default_rng(0)
    table = table_of(generator.random(20), generator.random(20))
    resources = [Resource("flops", Product(), 120.0)]
    choice = select_for_budgets(table, resources, LOOSE)
    assert choice.values["flops"] <= 120
    assert choice.importance <= 1.1 * best_loss(table, resources)


def test_the_binding_limit_alone_sets_the_price():
    """The same importance in all sets: what saves most of the limit that binds leaves first."""
    table = table_of(np.full(10, 1.0), np.full(10, 1.0))
    cheap, dear = Sum(np.array([1.0, 4.0])), Sum(np.array([4.0, 1.0]))
    for binding, first in ((cheap, 1), (dear, 0)):
        other = dear if binding is cheap else cheap
        resources = [Resource("flops", binding, 30.0), Resource("memory", other, 49.5)]
        choice = select_for_budgets(table, resources, LOOSE)
        kept = [part.sum() for part in np.split(choice.kept, table.offsets[1:-1])]
        assert kept[first] < kept[1 - first] == 10
        assert choice.binding == ("flops",)


def test_impossible_limits_name_what_binds_and_what_the_floors_allow():
    table = table_of(np.ones(10), np.ones(10))
    quantity = Sum(np.array([1.0, 1.0]))
    resources = [Resource("flops", quantity, 3.0), Resource("memory", quantity, 15.0)]
    with pytest.raises(
        BudgetError, match=r"flops is 20 and asked to be at most 3, and the floors allow 10 .*binds is flops,"
    ):
        check_budgets(table, resources, Limits(min_fraction=0.5))
    with pytest.raises(BudgetError, match=r"min_fraction=0\.5"):
        select_for_budgets(table, resources, Limits(min_fraction=0.5))
    with pytest.raises(SmallBudgetError, match="as it is"):
        check_budgets(table, [Resource("flops", quantity, 20.0)], LOOSE)


def test_widths_stay_multiples_of_the_measured_steps():
    generator = np.random.default_rng(0)
    table = table_of(generator.random(64), generator.random(64))
    resources = [Resource("latency.prefill", Sum(np.array([1.0, 2.0])), 100.0)]
    choice = select_for_budgets(table, resources, Limits(), multiple=np.array([16, 8]))
    kept = [part.sum() for part in np.split(choice.kept, table.offsets[1:-1])]
    assert kept[0] % 16 == 0 and kept[1] % 8 == 0 and kept[0] + 2 * kept[1] <= 100


def test_trade_offs_rise_in_importance_as_the_quantity_falls():
    generator = np.random.default_rng(0)
    table = table_of(generator.random(30), generator.random(30))
    flops, memory = Sum(np.array([1.0, 3.0])), Sum(np.array([2.0, 1.0]))
    points = trade_off(table, Resource("flops", flops, 60.0), [Resource("memory", memory, 60.0)], LOOSE)
    assert points[0] == {"flops": 120.0, "memory": 90.0, "importance": 0.0}
    for a, b in itertools.pairwise(points):
        assert b["flops"] < a["flops"] and b["memory"] <= a["memory"] and b["importance"] > a["importance"]


def test_hundreds_of_thousands_of_groups_are_planned_in_seconds():
    generator = np.random.default_rng(0)
    table = table_of(*(generator.random(28672) for _ in range(16)))
    quantities = [Sum(generator.uniform(1, 2, 16)), Sum(generator.uniform(1, 2, 16))]
    resources = [
        Resource(n, q, 0.7 * q.value(table.sizes)) for n, q in zip(("flops", "memory"), quantities, strict=True)
    ]
    begun = time.process_time()
    choice = select_for_budgets(table, resources, Limits())
    assert time.process_time() - begun < 10
    assert all(choice.values[r.name] <= r.target for r in resources)
