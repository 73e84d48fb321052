"""Group sets of models that no description covers: where a cut finds them, and how they follow it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

from torch import nn

from lit_prune.architectures.registry import find_group_sets, find_model
from lit_prune.architectures.tracing.integers import ADAPTATIONS, adaptation_name
from lit_prune.errors import UnsupportedModelError
from lit_prune.group_data import (
    GROUPS_ATTRIBUTE,
    GroupData,
    keep_group_sets,
    kept_group_sets,
    renumbered,
    tensors_of,
    with_costs,
)
from lit_prune.groups import GroupSet
from lit_prune.plan import PruningPlan


def packed(model: nn.Module, group_sets: Sequence[GroupSet]) -> GroupData:
    """Group sets of a model, found by running it, as data."""
    return GroupData.pack(model, group_sets, adaptation_name)


def model_and_group_sets(module: nn.Module, plan: PruningPlan) -> tuple[nn.Module, list[GroupSet]]:
    """The model inside a module that a plan is for, and its group sets.

    A plan that holds its groups as data brings them along, so that a fresh dense model need not be run.

    Raises:
        PlanError: If the groups that the plan holds do not fit the model.
        UnsupportedModelError: If the plan holds none, and those of the model are not known.
    """
    if plan.groups is None:
        model = find_model(module)[1]
        return model, find_group_sets(model, blocks=bool(plan.blocks))
    model = module
    if not plan.groups.names_fit(module):
        try:
            model = find_model(module)[1]
        except UnsupportedModelError:
            # the error that says which parameter is missing comes from unpacking
            model = module
    return model, list(plan.groups.unpack(model, ADAPTATIONS))


def with_kept_groups(model: nn.Module, plan: PruningPlan) -> PruningPlan:
    """The plan with the groups of the model as data, if they are kept beside it and the plan has none yet."""
    kept = kept_group_sets(model)
    if kept is None or plan.groups is not None:
        return plan
    return replace(plan, groups=packed(model, kept))


def groups_after_cut(
    model: nn.Module, group_sets: list[GroupSet], plan: PruningPlan
) -> Callable[[], Callable[[], None]]:
    """Work out, before a cut, what group sets are kept beside the model after it.

    Args:
        model: The model, before the cut.
        group_sets: Its group sets.
        plan: The plan that is to be applied.

    Returns:
        A function to call once the model is cut. It keeps the new group sets, and returns a function that undoes this.
    """
    if plan.groups is None:
        return lambda: lambda: None
    tensors = tensors_of(model)
    parts = (part for s in group_sets for part in chain(s.slices, s.buffers))
    lengths = {(p.parameter, p.dim): tensors[p.parameter].shape[p.dim] for p in parts}
    after = renumbered(group_sets, {e.key: e.kept for e in plan.group_entries}, lengths)
    before = kept_group_sets(model)

    def keep() -> Callable[[], None]:
        keep_group_sets(model, with_costs(model, after))
        return undo

    def undo() -> None:
        if before is None:
            delattr(model, GROUPS_ATTRIBUTE)
        else:
            keep_group_sets(model, before)

    return keep
