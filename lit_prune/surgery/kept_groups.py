"""Group sets of models that no description covers: where a cut finds them, and how they follow it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from lit_prune.architectures.registry import find_group_sets, find_model
from lit_prune.architectures.tracing.integers import ADAPTATIONS, adaptation_name
from lit_prune.errors import UnsupportedModelError
from lit_prune.group_data import (
    GROUPS_ATTRIBUTE,
    GroupData,
    dimension_lengths,
    keep_group_sets,
    kept_group_sets,
    kept_groups,
)
from lit_prune.groups import GroupSet, Slice, group_cost
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
        return model, find_group_sets(model, blocks=bool(plan.blocks), hidden=plan.hidden)
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
    lengths = dimension_lengths(model, group_sets)
    after = _renumbered(group_sets, {e.key: e.kept for e in plan.group_entries}, lengths)
    after = tuple(_with_biases(s, plan.biases) for s in after)
    before = kept_groups(model)

    def keep() -> Callable[[], None]:
        keep_group_sets(model, _with_costs(model, after))
        return undo

    def undo() -> None:
        if before is None:
            delattr(model, GROUPS_ATTRIBUTE)
        else:
            setattr(model, GROUPS_ATTRIBUTE, before)

    return keep


def _renumbered(
    group_sets: Sequence[GroupSet],
    kept_groups: Mapping[tuple[str, str], Sequence[int]],
    lengths: Mapping[tuple[str, int], int],
) -> tuple[GroupSet, ...]:
    """Group sets as they are after a cut: of the groups that stay, at the positions that these have then.

    Args:
        group_sets: The group sets before the cut.
        kept_groups: By key of a set that loses something, the groups that stay.
        lengths: Length before the cut of every dimension that a slice lies along, by parameter or buffer and dimension.
    """
    stays = {place: torch.ones(length, dtype=torch.bool) for place, length in lengths.items()}
    for group_set in group_sets:
        if group_set.key in kept_groups:
            removed = group_set.kept_to_removed(kept_groups[group_set.key])
            for part in chain(group_set.slices, group_set.buffers):
                stays[part.parameter, part.dim][part.index[removed].flatten()] = False
    positions = {place: mask.cumsum(0) - 1 for place, mask in stays.items()}
    return tuple(_renumbered_set(s, kept_groups.get(s.key), positions) for s in group_sets)


def _renumbered_set(
    group_set: GroupSet, kept: Sequence[int] | None, positions: Mapping[tuple[str, int], Tensor]
) -> GroupSet:
    groups = torch.arange(group_set.size) if kept is None else torch.as_tensor(list(kept), dtype=torch.long)

    def moved(parts: Iterable[Slice]) -> tuple[Slice, ...]:
        return tuple(replace(p, index=positions[p.parameter, p.dim][p.index[groups]]) for p in parts)

    return replace(group_set, size=len(groups), slices=moved(group_set.slices), buffers=moved(group_set.buffers))


def _with_biases(group_set: GroupSet, modules: Collection[str]) -> GroupSet:
    """The group set with the biases that modules got, as far as they belong to what the groups produce."""
    produced = [p for p in group_set.slices if p.input_dim is not None and not p.consumes and p.module in modules]
    biases = tuple(Slice(f"{p.module}.bias", 0, p.index) for p in produced)
    return replace(group_set, slices=(*group_set.slices, *biases))


def _with_costs(model: nn.Module, group_sets: Iterable[GroupSet]) -> tuple[GroupSet, ...]:
    """The group sets with the cost that a group has in the model as it is now."""
    return tuple(replace(s, cost=group_cost(model, s.slices)) for s in group_sets)
