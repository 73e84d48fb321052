"""What a plan means for each parameter: the positions along each dimension that stay and that are removed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lit_prune.groups import BLOCK, GroupSet, Slice, check_names
from lit_prune.plan import PruningPlan
from lit_prune.surgery.tensors import DimensionCut


def parameter_cuts(
    model: nn.Module, plan: PruningPlan, group_sets: Sequence[GroupSet]
) -> dict[str, list[DimensionCut]]:
    """What a plan means for every parameter that it touches.

    Args:
        model: The model.
        plan: A plan that fits the model.
        group_sets: The model's group sets.

    Returns:
        By parameter name, one cut for every dimension that loses something.

    Raises:
        PlanError: If the plan does not fit.
    """
    check_names(model, group_sets)
    plan.validate(group_sets)
    return _cuts(dict(model.named_parameters(remove_duplicate=False)), plan, group_sets, lambda s: s.slices)


def buffer_cuts(model: nn.Module, plan: PruningPlan, group_sets: Sequence[GroupSet]) -> dict[str, list[DimensionCut]]:
    """What a plan means for every buffer that it touches: by buffer name, one cut for every dimension that loses something.

    Args:
        model: The model.
        plan: A plan that fits the model.
        group_sets: The model's group sets.
    """
    return _cuts(dict(model.named_buffers(remove_duplicate=False)), plan, group_sets, lambda s: s.buffers)


def _cuts(
    tensors: Mapping[str, Tensor],
    plan: PruningPlan,
    group_sets: Sequence[GroupSet],
    slices: Callable[[GroupSet], Sequence[Slice]],
) -> dict[str, list[DimensionCut]]:
    """By name, what stays and what is removed, all sets that have parts of one tensor together."""
    by_key = {s.key: s for s in group_sets}
    masks: dict[tuple[str, int], Tensor] = {}
    for entry in plan.group_entries:
        group_set = by_key[entry.key]
        removed = group_set.kept_to_removed(entry.kept)
        for part in slices(group_set):
            length = tensors[part.parameter].shape[part.dim]
            mask = masks.setdefault((part.parameter, part.dim), torch.ones(length, dtype=torch.bool))
            mask[part.index[removed].flatten()] = False
    cuts: dict[str, list[DimensionCut]] = {}
    for (name, dim), mask in masks.items():
        cuts.setdefault(name, []).append(DimensionCut(dim, mask.nonzero().flatten(), (~mask).nonzero().flatten()))
    return cuts


def touched_parameters(
    model: nn.Module, group_sets: Iterable[GroupSet], kinds: Collection[str] | None = None
) -> dict[str, set[int]]:
    """What any plan may cut, before there is one.

    Args:
        model: The model.
        group_sets: Its group sets.
        kinds: The kinds of groups that may be removed; ``None`` for all.

    Returns:
        By parameter name, the dimensions along which the parameter may become smaller. Whole blocks are not among them:
        their parameters are removed as they are.
    """
    touched: dict[str, set[int]] = {}
    for group_set in group_sets:
        if group_set.kind != BLOCK and (kinds is None or group_set.kind in kinds):
            for part in group_set.slices:
                touched.setdefault(part.parameter, set()).add(part.dim)
    return touched
