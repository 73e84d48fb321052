"""The group table of a model, by the names and sizes that it had before earlier cuts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lit_prune.errors import BudgetError
from lit_prune.groups import HIDDEN, GroupSet, count_parameters, count_removed
from lit_prune.plan import get_plan
from lit_prune.ranking.selection import Limits, select
from lit_prune.ranking.table import GroupTable


def model_size(model: nn.Module, group_sets: Sequence[GroupSet]) -> tuple[int, int]:
    """Parameters of the model, and how many of them belong to groups."""
    return count_parameters(model), count_removed(model, group_sets, [torch.arange(s.size) for s in group_sets])


def group_table(model: nn.Module, group_sets: Sequence[GroupSet], importance: Sequence[Tensor]) -> GroupTable:
    """The group table, by the names and layers that everything had before blocks left in earlier cuts."""
    plan = get_plan(model)
    return GroupTable.build(group_sets if plan is None else [plan.original(s) for s in group_sets], importance)


def original_sizes(model: nn.Module) -> dict[tuple[str, str], int]:
    """Sizes of the group sets that earlier cuts made smaller, as they were before, by key."""
    plan = get_plan(model)
    return {} if plan is None else {e.key: e.size for e in plan.entries}


_ROUNDS = 20


def select_in_model(
    model: nn.Module, group_sets: Sequence[GroupSet], table: GroupTable, budget: int, limits: Limits
) -> int:
    """Mark in the table which groups stay, and give the number of parameters that leave.

    Groups of different sets may share weights (a channel of all experts and a whole expert; a hidden channel and one of an
    MLP), which leave once but are in the cost of both: as many groups more leave as that leaves short of the budget.

    Raises:
        BudgetError: If the limits do not let so many parameters leave, or the budget is smaller than one step.
    """
    asked, best, chosen = budget, -1, table.kept
    at_best, minimum = 0, table.minimum
    for _ in range(_ROUNDS):
        try:
            table.kept = select(table, asked, limits, original_sizes(model))
        except BudgetError as error:
            if best < 0:
                raise
            raise BudgetError(
                f"The budget asks to remove {budget:,} parameters, but under the limits no more than about {best:,} can leave:"
                " groups of different kinds share weights, which leave once. Lower the ratio, or relax the limits"
                f" (min_fraction={limits.min_fraction}, rounding {limits.multiple_of}, kinds {limits.kinds})."
            ) from error
        removed, nominal = count_removed(model, group_sets, table.removed_groups()), table.removed_cost
        if best < removed <= budget:
            best, chosen, at_best = removed, table.kept, nominal
        elif removed > budget and best >= 0 and (fixed := _without_wide_steps(table, chosen)) is not None:
            # what is left of the budget is less than a step of hidden channels: smaller groups fill it up
            table.minimum, asked = fixed, at_best + budget - best
            continue
        if nominal == removed or 0 <= budget - removed < table.cost.min():
            break
        asked = nominal + budget - removed
    table.kept, table.minimum = chosen, minimum
    return best


def _without_wide_steps(table: GroupTable, kept: np.ndarray) -> np.ndarray | None:
    """The least numbers of groups under which no more hidden channels leave than in a choice; ``None`` if they hold already."""
    minimum = np.zeros_like(table.sizes) if table.minimum is None else table.minimum.copy()
    before = minimum.copy()
    for position, (_, kind) in enumerate(table.keys):
        if kind == HIDDEN:
            minimum[position] = int(kept[table.offsets[position] : table.offsets[position + 1]].sum())
    return None if (minimum == before).all() else minimum
