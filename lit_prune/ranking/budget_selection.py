r"""Selection of the groups to remove under several limits at once.

Rows leave by ascending score, importance / price, as under a budget of parameters. The price of a group is what it saves:
:math:`p = \sum_b \lambda_b\, s_b / (v_b - t_b)`, where :math:`s_b` is what it saves of quantity b, :math:`v_b` what the model
takes, and :math:`t_b` the limit. With one limit that is the marginal cost. With several, the multipliers :math:`\lambda`
are those of the Lagrangian: each limit is tried alone, and if that leaves others unmet before it is met itself, the weights
are moved, round after round, from limits that end below their target towards those that bind (multiplicative weights). Of
all tries, each of which meets every limit, the one that loses the least importance is taken. For given weights the rows
leave in one order, and the shortest beginning of it that meets all limits is found by bisection with the exact quantities,
not with sums of prices; what the last step saves too much is given back by the most important steps that fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lit_prune.budgets.resources import Resource
from lit_prune.errors import BudgetError, SmallBudgetError
from lit_prune.ranking.selection import Limits
from lit_prune.ranking.steps import Steps, find_steps
from lit_prune.ranking.table import GroupTable

_ROUNDS = 8
# a choice may end below a limit by this part of what has to go; one further below tries other steps, so many times
_NEAR, _SKIPPED = 0.005, 6
# limits bind that a choice ends as near to as to the nearest one, to this part of what has to go
_BINDS = 0.01
# how far a limit that ends at half of its target moves its multiplier
_RATE = 4.0


@dataclass(eq=False)
class Choice:
    """What a selection under limits came to.

    Args:
        kept: Whether each row stays, bool array of shape ``(rows,)``.
        price: What each row saves, weighted over the limits, float array of shape ``(rows,)``; 1 is all that has to go.
        importance: The importance that is lost.
        values: What the model takes afterwards, by name of the resource.
        binding: The limits that the choice is nearest to.
    """

    kept: np.ndarray
    price: np.ndarray
    importance: float
    values: dict[str, float]
    binding: tuple[str, ...]


def select_for_budgets(
    table: GroupTable,
    resources: Sequence[Resource],
    limits: Limits,
    original: Mapping[tuple[str, str], int] | None = None,
    multiple: np.ndarray | None = None,
) -> Choice:
    """Choose the rows to keep so that every limit is met.

    Args:
        table: The group table.
        resources: The limits.
        limits: Floors, protections and rounding.
        original: Sizes of group sets before earlier cuts, by key, for floors that are fractions.
        multiple: Numbers that the kept groups of every set must be multiples of, in place of those of ``limits``.

    Raises:
        BudgetError: If the floors do not let all limits be met; the message says what they allow, and which limits fail.
        SmallBudgetError: If the model meets all limits as it is.
    """
    search = _search(table, resources, limits, original, multiple)
    search.check(limits)
    return min(search.choices(), key=lambda choice: choice.importance)


def check_budgets(
    table: GroupTable,
    resources: Sequence[Resource],
    limits: Limits,
    original: Mapping[tuple[str, str], int] | None = None,
    multiple: np.ndarray | None = None,
) -> None:
    """Check that limits can be met, whatever the importance of the groups is; arguments and errors as above."""
    _search(table, resources, limits, original, multiple).check(limits)


def _search(
    table: GroupTable,
    resources: Sequence[Resource],
    limits: Limits,
    original: Mapping[tuple[str, str], int] | None,
    multiple: np.ndarray | None,
) -> _Search:
    multiple = limits.multiples(table, original) if multiple is None else multiple
    steps = find_steps(table, limits.floor(table, original), multiple, uniform=limits.uniform)
    return _Search(table, steps, resources)


def trade_off(
    table: GroupTable,
    resource: Resource,
    others: Sequence[Resource],
    limits: Limits,
    original: Mapping[tuple[str, str], int] | None = None,
    multiple: np.ndarray | None = None,
    points: int = 16,
) -> list[dict[str, float]]:
    """What every size of the cut costs in importance and saves, along the order that one quantity is cut best in.

    Args:
        table: The group table.
        resource: The quantity that prices are of.
        others: Further quantities to report.
        limits: Floors, protections and rounding.
        original: Sizes of group sets before earlier cuts, by key.
        multiple: Numbers that the kept groups of every set must be multiples of, in place of those of ``limits``.
        points: Number of points, the model as it is among them.

    Returns:
        For every point the values by name of the quantity, and ``"importance"``, the predicted increase of the loss.
    """
    search = _search(table, [resource, *others], limits, original, multiple)
    order = search.order(search.price(np.array([1.0, *[0.0] * len(others)]), search.sizes))
    found = []
    for count in np.unique(np.linspace(0, len(order), points).round().astype(int)):
        chosen = search.beginning(order, int(count))
        kept = search.kept(chosen)
        values = {r.name: float(r.quantity.value(kept)) for r in (resource, *others)}
        found.append({**values, "importance": search.lost(chosen)})
    return found


def trade_offs(
    table: GroupTable,
    resources: Sequence[Resource],
    limits: Limits,
    original: Mapping[tuple[str, str], int] | None = None,
    multiple: np.ndarray | None = None,
) -> dict[str, list[dict[str, float]]]:
    """The :func:`trade_off` of every quantity, with the others reported beside it, by name of the quantity.

    Args:
        table: The group table.
        resources: The quantities.
        limits: Floors, protections and rounding.
        original: As for :func:`trade_off`.
        multiple: As for :func:`trade_off`.
    """
    return {
        r.name: trade_off(table, r, [other for other in resources if other is not r], limits, original, multiple)
        for r in resources
    }


class _Search:
    """The steps of a table under some limits, and what becomes of the quantities when steps leave."""

    def __init__(self, table: GroupTable, steps: Steps, resources: Sequence[Resource]) -> None:
        self.table, self.steps, self.resources = table, steps, resources
        self.sizes = table.sizes.astype(np.int64)
        rows = np.flatnonzero(steps.of_row >= 0)
        pairs = steps.of_row[rows] * len(self.sizes) + table.set_of_row[rows]
        found, counts = np.unique(pairs, return_counts=True)
        self._step, self._set, self._count = found // len(self.sizes), found % len(self.sizes), counts
        # the step with which the block around a row leaves, -1 if that stays
        self._block_step = np.append(steps.of_row, -1)[table.block_of_row]
        self.dense = np.array([r.quantity.value(self.sizes) for r in resources], dtype=np.float64)
        self.target = np.array([r.target for r in resources], dtype=np.float64)
        self.need = np.maximum(self.dense - self.target, 0)

    def check(self, limits: Limits) -> None:
        """Refuse limits that are met already, or never."""
        lowest = self.values(np.ones(len(self.steps), dtype=bool))
        if not self.need.any():
            pairs = zip(self.resources, self.dense, strict=True)
            met = ", ".join(f"{r.name} {r.shown(v)} of {r.shown(r.target)}" for r, v in pairs)
            raise SmallBudgetError(f"The model meets the budget as it is ({met}); nothing would be removed.")
        missed = [i for i in range(len(self.resources)) if lowest[i] > self.target[i]]
        if missed:
            said = "; ".join(
                f"{r.name} is {r.shown(d)} and asked to be at most {r.shown(r.target)}, and the floors allow {r.shown(low)}"
                f" ({d / low:.3g}x)" + ("" if i in missed else ", which is met")
                for i, (r, d, low) in enumerate(zip(self.resources, self.dense, lowest, strict=True))
            )
            binds = " and ".join(self.resources[i].name for i in missed)
            raise BudgetError(
                f"The budget cannot be met: {said}. What binds is {binds}, under the floors (min_groups={limits.min_groups},"
                f" min_fraction={limits.min_fraction}), protections {list(limits.protect)}, rounding {limits.multiple_of} and"
                f" kinds {limits.kinds}. Ask for less, or relax one of these."
            )

    def choices(self) -> Iterator[Choice]:
        """Every try: each limit that is not met yet alone, and mixes of several where none of them is enough alone."""
        asked = np.flatnonzero(self.need)
        ends = []
        for number in asked:
            weights = np.zeros(len(self.resources))
            weights[number] = 1
            choice, slack = self._try(weights)
            ends.append(slack[asked])
            yield choice
        if len(asked) == 1:
            return
        # multipliers start where the limits that bind when others are priced weigh more
        weights = np.zeros(len(self.resources))
        weights[asked] = 1 / len(asked)
        for _ in range(_ROUNDS):
            choice, slack = self._try(weights)
            yield choice
            moved = weights * np.exp(-_RATE * (slack - slack[asked].min()))
            weights = moved / moved.sum()
            if np.ptp(slack[asked]) < 1e-3:
                break

    def _try(self, weights: np.ndarray) -> tuple[Choice, np.ndarray]:
        """The shortest order for some multipliers that meets every limit; and how far below each limit that ends."""
        kept, best = self.sizes, None
        for _ in range(2):
            price = self.price(weights, kept)
            for chosen in self._beginnings(self.order(price), price):
                lost = self.lost(chosen)
                if best is None or lost < best[0]:
                    best = lost, chosen, price
            assert best is not None
            chosen = best[1]
            # where sets share weights, what a group saves depends on what else leaves
            middle = (self.sizes + self.kept(chosen) + 1) // 2
            if np.allclose(self.price(weights, middle), price, rtol=0.01):
                break
            kept = middle
        assert best is not None
        lost, chosen, price = best
        values = self.values(chosen)
        slack = np.divide(self.target - values, self.need, out=np.zeros_like(values), where=self.need > 0)
        removed = np.append(chosen, False)
        by_name = {r.name: float(v) for r, v in zip(self.resources, values, strict=True)}
        asked = self.need > 0
        tight = asked & (slack <= slack[asked].min() + _BINDS)
        binding = tuple(r.name for r, binds in zip(self.resources, tight, strict=True) if binds)
        keeps = ~(removed[self.steps.of_row] | removed[self._block_step])
        return Choice(keeps, price[self.table.set_of_row], lost, by_name, binding), slack

    def price(self, weights: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """What one more group of every set saves, as a fraction of what has to go, weighted over the limits."""
        total = np.zeros(len(self.sizes))
        for resource, weight, need, dense in zip(self.resources, weights, self.need, self.dense, strict=True):
            if weight > 0:
                total += weight * np.maximum(resource.quantity.saved(kept), 0) / (need or dense)
        return total

    def order(self, price: np.ndarray) -> np.ndarray:
        """The steps that save something, by ascending score."""
        score = self.steps.score(self._cost(price))
        order = np.argsort(score, kind="stable")
        return order[np.isfinite(score[order])]

    def _cost(self, price: np.ndarray) -> np.ndarray:
        return np.bincount(self._step, weights=self._count * price[self._set], minlength=len(self.steps))

    def beginning(self, order: np.ndarray, count: int) -> np.ndarray:
        """The first steps of an order, as a mask."""
        chosen = np.zeros(len(self.steps), dtype=bool)
        chosen[order[:count]] = True
        return chosen

    def kept(self, chosen: np.ndarray) -> np.ndarray:
        """The number of groups that stay in every set."""
        leaving = np.bincount(self._set, weights=self._count * chosen[self._step], minlength=len(self.sizes))
        return self.sizes - leaving.astype(np.int64)

    def values(self, chosen: np.ndarray) -> np.ndarray:
        """What the model takes without some steps, by resource."""
        kept = self.kept(chosen)
        return np.array([r.quantity.value(kept) for r in self.resources], dtype=np.float64)

    def met(self, chosen: np.ndarray) -> bool:
        """Whether all limits are met without some steps."""
        return bool((self.values(chosen) <= self.target).all())

    def lost(self, chosen: np.ndarray) -> float:
        """The importance of what leaves; what leaves with its block is in that of the block."""
        removed = np.append(chosen, False)
        leaves = removed[self.steps.of_row] & ~removed[self._block_step]
        return float(self.table.importance[leaves].sum())

    def _beginnings(self, order: np.ndarray, price: np.ndarray) -> Iterator[np.ndarray]:
        """The shortest beginning of an order that meets all limits; and those without a step that overshoots by much."""
        if not self.met(self.beginning(order, len(order))):
            # what saves nothing of the price may save what others need
            order = np.concatenate([order, np.setdiff1d(np.arange(len(self.steps)), order)])
        for _ in range(_SKIPPED):
            count = self._shortest(order)
            chosen = self._trimmed(self.beginning(order, count), price)
            yield chosen
            over = (self.target - self.values(chosen))[self.need > 0] / self.need[self.need > 0]
            if over.min() < _NEAR or not count:
                return
            last = int(order[count - 1])
            later = (self.steps.unit[order] == self.steps.unit[last]) & (np.arange(len(order)) >= count - 1)
            order = order[~later]
            if not self.met(self.beginning(order, len(order))):
                return

    def _shortest(self, order: np.ndarray) -> int:
        """The length of the shortest beginning of an order that meets all limits; the whole order does."""
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            if self.met(self.beginning(order, middle)):
                high = middle
            else:
                low = middle + 1
        return high

    def _trimmed(self, chosen: np.ndarray, price: np.ndarray) -> np.ndarray:
        """Give back the most important steps that the limits leave room for; of every unit the last first."""
        score = self.steps.score(self._cost(price))
        kept, first = self.kept(chosen), self.steps.starts[:-1]
        # those that leave are the first of every unit
        leaving = np.bincount(self.steps.unit[chosen], minlength=len(first))
        open_units = leaving > 0
        while open_units.any():
            units = np.flatnonzero(open_units)
            ends = first[units] + leaving[units] - 1
            place = int(np.argmax(score[ends]))
            unit, step = units[place], int(ends[place])
            back = kept.copy()
            pairs = slice(*np.searchsorted(self._step, [step, step + 1]))
            back[self._set[pairs]] += self._count[pairs]
            if all(r.quantity.value(back) <= t for r, t in zip(self.resources, self.target, strict=True)):
                kept, chosen[step] = back, False
                leaving[unit] -= 1
                open_units[unit] = leaving[unit] > 0
            else:
                open_units[unit] = False
        return chosen
