"""Steps: the rows of the group table that leave together, in the order in which those of a set must leave."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lit_prune.errors import BudgetError
from lit_prune.groups import BLOCK
from lit_prune.ranking.table import GroupTable


@dataclass(eq=False)
class Steps:
    """Rows that leave together: single rows, unless widths are rounded or sets have to keep the same width.

    Args:
        of_row: The step of every row, -1 for rows that stay whatever is asked for, int array of shape ``(rows,)``.
        starts: First step of every unit (a set, or the sets that keep the same width), and the number of steps at the end.
            The steps of a unit are numbered in the order in which they must leave.
        importance: Importance of every step, float array of shape ``(steps,)``.
        unit: The unit of every step.
    """

    of_row: np.ndarray
    starts: np.ndarray
    importance: np.ndarray
    unit: np.ndarray

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.importance)

    def cost(self, cost_of_row: np.ndarray) -> np.ndarray:
        """What every step costs, given what its rows do."""
        inside = self.of_row >= 0
        summed = np.bincount(self.of_row[inside], weights=cost_of_row[inside], minlength=len(self))
        return summed.astype(cost_of_row.dtype)

    def score(self, cost: np.ndarray) -> np.ndarray:
        """Importance / cost of every step, never below that of a step that leaves before it; infinite where nothing is saved."""
        score = np.divide(self.importance, cost, out=np.full(len(self), np.inf), where=cost > 0)
        for start, stop in pairwise(self.starts):
            # means of ascending scores ascend but for rounding, and the order of leaving must not depend on that
            np.maximum.accumulate(score[start:stop], out=score[start:stop])
        return score


def find_steps(table: GroupTable, floor: np.ndarray, multiple: np.ndarray, *, uniform: bool = False) -> Steps:
    """Group the rows that may leave into steps that leave together.

    Args:
        table: The group table; within a set all rows cost the same.
        floor: The number of groups that must stay in every set, see :meth:`Limits.floor`.
        multiple: The number that the kept groups of every set must be a multiple of.
        uniform: Whether the n-th steps of all sets of a kind leave together.
    """
    sets, score = table.set_of_row, table.score
    # a step takes as many rows from each of the parts of a set that have to stay equally large
    parts = np.ones_like(table.sizes) if table.equal_parts is None else table.equal_parts
    sizes = table.sizes // parts
    rank = np.empty(len(table), dtype=np.int64)
    for start, stop, count in zip(table.offsets[:-1], table.offsets[1:], parts, strict=True):
        order = score[start:stop].reshape(count, -1).argsort(axis=1, kind="stable")
        np.put_along_axis(rank[start:stop].reshape(count, -1), order, np.arange(order.shape[1])[None], axis=1)
    multiple = multiple // np.gcd(multiple, parts)
    floor = -(-floor // (parts * multiple)) * multiple
    removable = np.maximum(sizes - floor, 0)
    # the first step takes what is over the last whole multiple, so that every later state is a whole multiple
    surplus = sizes % multiple
    in_set = np.where(rank < surplus[sets], 0, (rank - surplus[sets]) // multiple[sets] + (surplus[sets] > 0))
    steps_per_set = np.where(removable > 0, (removable - surplus) // multiple + (surplus > 0), 0)
    starts = np.concatenate([[0], steps_per_set.cumsum()])
    step_of_row = np.where(rank < removable[sets], starts[:-1][sets] + in_set, -1)
    if uniform:
        step_of_row, starts = _merge_uniform(table, step_of_row, starts)
    inside = step_of_row >= 0
    importance = np.bincount(step_of_row[inside], weights=table.importance[inside], minlength=starts[-1])
    unit = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    return Steps(step_of_row, starts, importance, unit)


class StepCosts:
    """What steps cost, given what leaves before them: a block is charged what is still there, what is in it nothing after it.

    Args:
        table: The group table.
        step_of_row: The step of every row, -1 for rows that stay.
        step_cost: The cost of every step by itself.
    """

    def __init__(self, table: GroupTable, step_of_row: np.ndarray, step_cost: np.ndarray) -> None:
        # the step with which the block around a row leaves, -1 if it has none or that stays
        self.block_step = np.append(step_of_row, -1)[table.block_of_row]
        self._nested = self.block_step >= 0
        self._step, self._block = step_of_row[self._nested], self.block_step[self._nested]
        self._row_cost, self._step_cost = table.cost[self._nested], step_cost

    def __call__(self, steps: np.ndarray, gone: np.ndarray | None = None, *, in_turn: bool = True) -> np.ndarray:
        """The cost of every one of some steps, after those marked in ``gone`` and, if in turn, those before it."""
        cost, never = self._step_cost, len(self._step_cost)
        if len(self._row_cost):
            when = np.full(never + 1, never)
            if in_turn:
                when[steps] = np.arange(len(steps))
            if gone is not None:
                when[:-1][gone] = -1
            by_itself, by_block = when[self._step], when[self._block]
            free = (by_block < by_itself) & (self._step >= 0)
            paid = by_itself < by_block
            cost = cost - np.bincount(self._step[free], self._row_cost[free], never).astype(np.int64)
            cost -= np.bincount(self._block[paid], self._row_cost[paid], never).astype(np.int64)
            cost = np.maximum(cost, 0)
        return cost[steps]


def _uniform_units(table: GroupTable) -> np.ndarray:
    """For every set the number of those that keep the same width: sets of a kind, but every block by itself.

    Where the sets of a kind differ in size (experts beside dense MLPs), it is those at the same place of their layers.
    """
    sizes: dict[str, set[int]] = {}
    for (_, kind), size in zip(table.keys, table.sizes.tolist(), strict=True):
        sizes.setdefault(kind, set()).add(size)
    units: dict[tuple[str, str], int] = {}
    found = []
    for name, kind in table.keys:
        place = re.sub(r"\d+", "*", name) if len(sizes[kind]) > 1 else ""
        found.append(units.setdefault((name if kind == BLOCK else place, kind), len(units)))
    return np.array(found)


def _merge_uniform(table: GroupTable, step_of_row: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Let the n-th steps of all group sets of a kind leave together.

    Raises:
        BudgetError: If the sets of a kind that may lose groups differ in size, or in what the limits let leave.
    """
    unit_of_set = _uniform_units(table)
    steps, offset = np.diff(starts), [0]
    for number in range(unit_of_set.max() + 1):
        members = unit_of_set == number
        kind = table.keys[int(np.argmax(members))][1]
        if steps[members].any() and (len(set(table.sizes[members])) > 1 or len(set(steps[members])) > 1):
            raise BudgetError(
                f"A uniform plan needs {kind} group sets of one size and with the same limits; found sizes"
                f" {sorted(set(table.sizes[members].tolist()))} and removable steps {sorted(set(steps[members].tolist()))}."
            )
        offset.append(offset[-1] + int(steps[members][0]))
    merged = np.array(offset[:-1])[unit_of_set][table.set_of_row] + step_of_row - starts[:-1][table.set_of_row]
    return np.where(step_of_row >= 0, merged, -1), np.array(offset)
