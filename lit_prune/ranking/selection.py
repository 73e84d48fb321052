"""Selection of the groups to remove under a budget: a fractional knapsack over the whole model.

The rows of the group table are removed in the order of their score (importance / cost) until the removed cost reaches
the budget. Floors, protected layers and rounding only restrict which rows may be removed: within a group set the groups
are removed in the order of their score, so a floor is a limit on the length of that order and rounding a grouping of it
into steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lit_prune.arguments import (
    EXPRESSION,
    FLAG,
    FRACTION,
    INTEGER,
    MOST_GROUPS,
    RATIO,
    TEXT,
    Rule,
    check_fields,
    choice,
    count,
    either,
    mapping_of,
    optional,
    sequence_of,
)
from lit_prune.errors import ArgumentValueError, BudgetError, SmallBudgetError
from lit_prune.groups import BLOCK, HIDDEN, stack_of
from lit_prune.ranking.table import GroupTable

# other widths are slower to multiply (docs/cost.md), and formats of quantised weights have blocks of 32;
# 64 numbers of 16 bits are the 128 bytes that NVIDIA's guide to matrix multiplication names for an A100
ALIGNMENTS = (64, 32, 16, 8)
STEPS = 48


RATIO_OF = ("all", "prunable")

_RULES: dict[str, Rule] = {
    "min_groups": count(0, MOST_GROUPS),
    "min_fraction": FRACTION,
    "protect": sequence_of(
        "a list of layer indices and regular expressions",
        either("an index or a regular expression", INTEGER, EXPRESSION),
    ),
    "multiple_of": optional(mapping_of("a mapping of kinds to integers of 1 or more", TEXT, count(1, MOST_GROUPS))),
    "kinds": optional(sequence_of("a list of at least one kind of group", TEXT, empty=False)),
    "uniform": FLAG,
}


@dataclass(frozen=True)
class Limits:
    """Constraints on which groups may be removed.

    Args:
        min_groups: Smallest number of groups to keep in every group set. With 0 (and ``min_fraction=0``) a layer may
            lose its
            whole attention or MLP, where the architecture can do without it.
        min_fraction: Smallest fraction of the groups to keep in every group set, in [0, 1]. Both floors apply to the
            number of blocks, too, of which at least one is kept; a removed block is removed with everything in it.
        protect: Layers that stay whole: indices (negative ones count from the end) or regular expressions that
            are searched in the names of the group sets, and of the modules that they hold parameters of. A block is
            kept if anything in it is protected. Hidden channels, which all layers have, are kept only by the name of their
            own group set, that of the embedding.
        multiple_of: By kind, a number that the kept groups of a set must be a multiple of. Kinds that are not in it have what
            kernels ask for (8 for the heads of a Mamba-2), or 1. A set that starts out uneven may stay as it is. ``None``
            is the largest of :data:`ALIGNMENTS` for which a set has :data:`STEPS` such steps (64 for 3072 groups or more,
            32 for 1536), and what kernels ask for. Hidden channels stay a multiple of the number of heads as well where the
            model's config insists on that.
        kinds: The kinds of groups that may be removed; ``"block"`` stands for whole decoder layers, ``"hidden"`` for channels
            of the hidden states. ``None`` allows all kinds but those two.
        uniform: Every group set of a kind keeps the same number of groups, so that the model fits a stock config. Where they
            differ in size from the start (experts and dense MLPs), those at the same place of each layer.
    """

    min_groups: int = 1
    min_fraction: float = 0.2
    protect: Sequence[int | str] = ()
    multiple_of: Mapping[str, int] | None = None
    kinds: Sequence[str] | None = None
    uniform: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ArgumentTypeError: If one is of another type.
            ArgumentValueError: If one is out of its range.
        """
        check_fields(self, _RULES)

    @property
    def blocks(self) -> bool:
        """Whether whole blocks may be removed."""
        return BLOCK in (self.kinds or ())

    @property
    def hidden(self) -> bool:
        """Whether channels of the hidden states may be removed."""
        return HIDDEN in (self.kinds or ())

    def floor(self, table: GroupTable, original: Mapping[tuple[str, str], int] | None = None) -> np.ndarray:
        """The number of groups that must stay in every group set, int array of shape ``(sets,)``.

        Args:
            table: The group table.
            original: Sizes of group sets before earlier cuts, by key; ``min_fraction`` is of these.

        Raises:
            ValueError: If ``protect`` or ``kinds`` name something that the model does not have.
        """
        sizes = table.sizes
        fraction = np.ceil(self.min_fraction * _whole_sizes(table, original) - 1e-9)
        least = np.maximum(self.min_groups, 0 if table.minimum is None else table.minimum)
        floor = np.minimum(np.maximum(least, fraction), sizes).astype(np.int64)
        whole_block = np.array([kind == BLOCK for _, kind in table.keys])
        floor[whole_block] = 0
        hidden = np.array([kind == HIDDEN for _, kind in table.keys])
        known = sorted({kind for _, kind in table.keys})
        for kind in (*(self.kinds or ()), *(self.multiple_of or ())):
            if kind not in known:
                raise ArgumentValueError(f"The model has no groups of kind {kind!r}; its kinds are {', '.join(known)}.")
        for position, (_, kind) in enumerate(table.keys):
            if self.kinds is not None and kind not in self.kinds:
                floor[position] = sizes[position]
        layers = int(table.layers.max()) + 1
        for entry in self.protect:
            if isinstance(entry, int):
                chosen = (table.layers == (entry + layers if entry < 0 else entry)) & ~hidden
            else:
                chosen = np.array([any(re.search(entry, n) for n in names) for names in _names(table)])
            if not chosen.any():
                raise ArgumentValueError(
                    f"protect names {entry!r}, but no prunable layer matches: there are layers 0 to {layers - 1}, with"
                    f" names like {table.keys[0][0]!r}."
                )
            floor[chosen] = sizes[chosen]
            floor[whole_block & np.isin(np.arange(len(sizes)), table.block_of_set[chosen])] = 1
        self._keep_blocks(table, floor, original or {})
        return floor

    def multiples(self, table: GroupTable, original: Mapping[tuple[str, str], int] | None = None) -> np.ndarray:
        """The number that the kept groups of every group set must be a multiple of, int array of shape ``(sets,)``."""
        kernels = np.ones_like(table.sizes) if table.multiple_of is None else table.multiple_of
        if self.multiple_of is None:
            whole = _whole_sizes(table, original)
            return np.lcm(np.select([whole >= STEPS * a for a in ALIGNMENTS], ALIGNMENTS, 1), kernels)
        asked = [self.multiple_of.get(kind, least) for (_, kind), least in zip(table.keys, kernels, strict=True)]
        # what a config asks of the hidden size is no matter of speed
        pairs = zip(table.keys, asked, kernels, strict=True)
        asked = [math.lcm(one, int(least)) if kind == HIDDEN else one for (_, kind), one, least in pairs]
        return np.array(asked, dtype=np.int64)

    def _keep_blocks(self, table: GroupTable, floor: np.ndarray, original: Mapping[tuple[str, str], int]) -> None:
        """Let so many blocks of every list stay as the floors say, those of the highest scores."""
        stacks: dict[str, list[int]] = {}
        for position, (name, kind) in enumerate(table.keys):
            if kind == BLOCK:
                stacks.setdefault(stack_of(name)[0], []).append(position)
        for stack, members in stacks.items():
            whole = original.get((stack, BLOCK), len(members))
            least = max(1, self.min_groups, math.ceil(self.min_fraction * whole - 1e-9))
            candidates = [p for p in members if not floor[p]]
            candidates.sort(key=lambda p: table.score[table.offsets[p]])
            floor[candidates[max(len(members) - least, 0) :]] = 1


def _names(table: GroupTable) -> Iterator[tuple[str, ...]]:
    """For every set its name, and those of the modules that it holds parameters of."""
    members = table.members or ((),) * len(table.keys)
    # every layer has hidden channels
    own = ((name, () if kind == HIDDEN else inner) for (name, kind), inner in zip(table.keys, members, strict=True))
    return ((name, *inner) for name, inner in own)


def _whole_sizes(table: GroupTable, original: Mapping[tuple[str, str], int] | None) -> np.ndarray:
    return np.array([(original or {}).get(key, size) for key, size in zip(table.keys, table.sizes, strict=True)])


def select(
    table: GroupTable,
    budget: int,
    limits: Limits | None = None,
    original: Mapping[tuple[str, str], int] | None = None,
) -> np.ndarray:
    """Choose the rows to keep so that about ``budget`` parameters are removed.

    Rows are removed by ascending score, ties in the order of the table. Where the next row in that order would
    overshoot, it is skipped and smaller ones further on are taken, so that the removed cost ends below the budget by
    less than the cost of the smallest step that may still be removed.

    Args:
        table: The group table.
        budget: Parameters that should leave.
        limits: Floors, protections and rounding; the default limits if ``None``.
        original: Sizes of group sets before earlier cuts, by key, for floors that are fractions.

    Returns:
        Bool array of shape ``(rows,)``: whether each row stays.

    Raises:
        BudgetError: If the limits do not let so many parameters leave, or the budget is smaller than one step.
    """
    limits = limits or Limits()
    step_of_row, step_score, step_cost = _steps(table, limits, original)
    cost_of = _Cost(table, step_of_row, step_cost)
    available = int(cost_of(np.arange(len(step_cost))).sum())
    if budget > available:
        total = int(table.cost[table.block_of_row < 0].sum())
        raise BudgetError(
            f"The budget asks to remove {budget:,} parameters, but only {available:,} of {total:,} prunable ones may be removed"
            f" under the floors (min_groups={limits.min_groups}, min_fraction={limits.min_fraction}), protections"
            f" {list(limits.protect)}, rounding {limits.multiple_of} and kinds {limits.kinds}. Lower the ratio or"
            " relax one of these."
        )
    if len(step_cost) == 0 or budget < step_cost.min():
        smallest = int(step_cost.min()) if len(step_cost) else None
        raise SmallBudgetError(
            f"The budget of {budget:,} parameters is less than the smallest removable group ({smallest})."
        )
    set_of_step = table.set_of_row[_first_row(step_of_row, len(step_cost))]
    if limits.uniform:
        set_of_step = _uniform_units(table)[set_of_step]
    chosen = _fill(step_score, cost_of, set_of_step, budget)
    # a step more for the rows that are in none
    removed = np.append(chosen, False)[step_of_row]
    return ~(removed | np.append(chosen, False)[cost_of.block_step])


def _first_row(step_of_row: np.ndarray, steps: int) -> np.ndarray:
    first = np.empty(steps, dtype=np.int64)
    rows = np.flatnonzero(step_of_row >= 0)[::-1]
    first[step_of_row[rows]] = rows
    return first


def _steps(
    table: GroupTable, limits: Limits, original: Mapping[tuple[str, str], int] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group the rows that may leave into steps that leave together (single rows unless widths are rounded).

    Returns:
        The step of every row (-1 for rows that stay), and the score and cost of every step. The steps of a set are
        numbered in the order in which they must leave.
    """
    sets, score = table.set_of_row, table.score
    # a step takes as many rows from each of the parts of a set that have to stay equally large
    parts = np.ones_like(table.sizes) if table.equal_parts is None else table.equal_parts
    sizes = table.sizes // parts
    order = np.lexsort((score, table.group // np.maximum(sizes, 1)[sets], sets))
    rank = np.empty(len(table), dtype=np.int64)
    rank[order] = (np.arange(len(table)) - np.repeat(table.offsets[:-1], table.sizes)) % np.maximum(sizes, 1)[sets]
    multiple = limits.multiples(table, original)
    multiple = multiple // np.gcd(multiple, parts)
    floor = -(-limits.floor(table, original) // (parts * multiple)) * multiple
    removable = np.maximum(sizes - floor, 0)
    # the first step takes what is over the last whole multiple, so that every later state is a whole multiple
    surplus = sizes % multiple
    in_set = np.where(rank < surplus[sets], 0, (rank - surplus[sets]) // multiple[sets] + (surplus[sets] > 0))
    steps_per_set = np.where(removable > 0, (removable - surplus) // multiple + (surplus > 0), 0)
    starts = np.concatenate([[0], steps_per_set.cumsum()])
    step_of_row = np.where(rank < removable[sets], starts[:-1][sets] + in_set, -1)
    if limits.uniform:
        step_of_row, starts = _merge_uniform(table, step_of_row, starts)
    inside = step_of_row >= 0
    cost = np.bincount(step_of_row[inside], weights=table.cost[inside], minlength=starts[-1]).astype(np.int64)
    importance = np.bincount(step_of_row[inside], weights=table.importance[inside], minlength=starts[-1])
    step_score = importance / np.maximum(cost, 1)
    for start, stop in pairwise(starts):
        # means of ascending scores ascend but for rounding, and the order of leaving must not depend on that
        np.maximum.accumulate(step_score[start:stop], out=step_score[start:stop])
    return step_of_row, step_score, cost


class _Cost:
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


def _fill(score: np.ndarray, cost_of: _Cost, sets: np.ndarray, budget: int) -> np.ndarray:
    """Take steps by ascending score; skip those that overshoot, and with one of them the later steps of its set."""
    chosen = np.zeros(len(score), dtype=bool)
    order = np.argsort(score, kind="stable")
    left = budget
    while len(order):
        total = cost_of(order, chosen).cumsum()
        taken = int(np.searchsorted(total, left, side="right"))
        if taken:
            left -= int(total[taken - 1])
        chosen[order[:taken]] = True
        if taken == len(order):
            break
        blocked = sets[order[taken]]
        order = order[taken + 1 :]
        order = order[sets[order] != blocked]
        order = order[cost_of(order, chosen, in_turn=False) <= left]
    return chosen


def parameter_budget(ratio: float, ratio_of: str, total: int, prunable: int) -> int:
    """Parameters to remove for a pruning ratio.

    Args:
        ratio: The fraction to remove, strictly between 0 and 1.
        ratio_of: ``"all"`` parameters of the model, or the ``"prunable"`` ones.
        total: Parameters of the model.
        prunable: Parameters that belong to groups.

    Raises:
        ValueError: If the ratio or ``ratio_of`` is out of its range.
    """
    check_ratio(ratio, ratio_of)
    return math.floor(ratio * (total if ratio_of == "all" else prunable))


def check_ratio(ratio: float, ratio_of: str) -> None:
    """Refuse a ratio that is not strictly between 0 and 1, or is of something unknown.

    Raises:
        ArgumentTypeError: If one is of another type.
        ArgumentValueError: If one is out of its range.
    """
    RATIO.check("pruning_ratio", ratio)
    choice(*RATIO_OF).check("ratio_of", ratio_of)
