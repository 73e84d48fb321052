"""The group table of a model, by the names and sizes that it had before earlier cuts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_prune.groups import GroupSet, count_parameters, count_removed
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

    Groups of different sets may share weights (a channel of all experts and a whole expert), which leave once but are in
    the cost of both: as many groups more leave as that leaves short of the budget.
    """
    asked, best, chosen = budget, -1, table.kept
    for _ in range(_ROUNDS):
        table.kept = select(table, asked, limits, original_sizes(model))
        removed, nominal = count_removed(model, group_sets, table.removed_groups()), table.removed_cost
        if best < removed <= budget:
            best, chosen = removed, table.kept
        if nominal == removed or 0 <= budget - removed < table.cost.min():
            break
        asked = nominal + budget - removed
    table.kept = chosen
    return best
