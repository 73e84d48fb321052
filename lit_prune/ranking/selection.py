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
from lit_prune.ranking.steps import StepCosts, find_steps
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


def mlp_multiples(multiple: int | None) -> dict[str, int] | None:
    """What ``Limits.multiple_of`` is where MLP widths are to be multiples of one number.

    Args:
        multiple: The number; 1 is any width, also of models without MLPs, and ``None`` the default.

    Raises:
        ArgumentTypeError: If it is no integer.
        ArgumentValueError: If it is not positive, or larger than any width.
    """
    multiple = optional(count(1, MOST_GROUPS)).check("mlp_multiple_of", multiple)
    return None if multiple is None else {} if multiple == 1 else {"mlp": multiple}


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
        """Let so many blocks of every list stay as the floors say, those of the highest scores, and one that counts tokens."""
        stacks: dict[str, list[int]] = {}
        for position, (name, kind) in enumerate(table.keys):
            if kind == BLOCK:
                stacks.setdefault(stack_of(name)[0], []).append(position)
        for stack, members in stacks.items():
            whole = original.get((stack, BLOCK), len(members))
            least = max(1, self.min_groups, math.ceil(self.min_fraction * whole - 1e-9))
            counting = [p for p in members if table.counts_tokens is not None and table.counts_tokens[p]]
            if counting and not floor[counting].any():
                floor[max(counting, key=lambda p: table.score[table.offsets[p]])] = 1
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
    steps = find_steps(table, limits.floor(table, original), limits.multiples(table, original), uniform=limits.uniform)
    step_of_row, step_cost = steps.of_row, steps.cost(table.cost)
    cost_of = StepCosts(table, step_of_row, step_cost)
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
    chosen = _fill(steps.score(step_cost), cost_of, steps.unit, budget)
    # a step more for the rows that are in none
    removed = np.append(chosen, False)[step_of_row]
    return ~(removed | np.append(chosen, False)[cost_of.block_step])


def _fill(score: np.ndarray, cost_of: StepCosts, sets: np.ndarray, budget: int) -> np.ndarray:
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
