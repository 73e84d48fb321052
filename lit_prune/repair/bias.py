"""Repair by biases: the mean of what is removed is added to the biases of its readers (An et al., FLAP, AAAI 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lit_prune.calibration.statistics import Statistics
from lit_prune.distributed import shards
from lit_prune.groups import GroupSet
from lit_prune.plan import AFTER, PruningPlan


@torch.no_grad()
def bias_fold(
    model: nn.Module, group_sets: Sequence[GroupSet], plan: PruningPlan, statistics: Statistics
) -> tuple[PruningPlan, dict[str, Tensor]]:
    """Add what the removed groups give on average to the biases of their consumers; those without a bias get one.

    Args:
        model: The dense model; it is not changed.
        group_sets: Its group sets.
        plan: The plan.
        statistics: Statistics with the mean inputs of the consumers.

    Returns:
        The plan with the biases that it adds, and the new biases by parameter name, for :func:`lit_prune.apply_plan`.
    """
    by_key = {s.key: s for s in group_sets}
    biases: dict[str, Tensor] = {}
    for entry in plan.group_entries:
        group_set = by_key[entry.key]
        removed = group_set.kept_to_removed(entry.kept)
        for part in group_set.repairable:
            module = model.get_submodule(part.module)
            weight = shards.full(model.get_parameter(part.parameter))
            columns = part.index[removed].flatten().to(weight.device)
            mean = statistics.activations[part.module].mean[columns].to(weight.device)
            lost = weight.index_select(part.dim, columns).double()
            lost = lost.T @ mean if part.dim == 0 else lost @ mean
            present = getattr(module, "bias", None)
            biases[f"{part.module}.bias"] = (lost if present is None else lost + shards.full(present)).to(weight.dtype)
    added = {
        name.removesuffix(".bias"): value.numel()
        for name, value in biases.items()
        if getattr(model.get_submodule(name[:-5]), "bias", None) is None
    }
    info = dict(plan.info)
    if AFTER in info:
        info[AFTER] += sum(added.values())
    return replace(plan, biases=tuple(sorted({*plan.biases, *added})), info=info), biases
