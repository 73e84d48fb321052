"""Repair by biases: the mean of what is removed is added to the biases of its readers (An et al., FLAP, AAAI 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.architectures.features import is_convolution, output_dim, spread_features
from lit_prune.architectures.plain_modules import TRANSPOSED
from lit_prune.calibration.statistics import Statistics
from lit_prune.distributed import shards
from lit_prune.groups import GroupSet
from lit_prune.plan import AFTER, PruningPlan
from lit_prune.surgery.plan_cuts import parameter_cuts


@torch.no_grad()
def bias_fold(
    model: nn.Module, group_sets: Sequence[GroupSet], plan: PruningPlan, statistics: Statistics
) -> tuple[PruningPlan, dict[str, Tensor]]:
    """Add what the removed groups give on average to the biases of their consumers; those without a bias get one.

    For a convolution that is the mean of the removed channels times the sum of their kernels, which is exact away from padding.

    Args:
        model: The dense model; it is not changed.
        group_sets: Its group sets.
        plan: The plan.
        statistics: Statistics with the mean inputs of the consumers.

    Returns:
        The plan with the biases that it adds, and the new biases by parameter name, for :func:`lit_prune.apply_plan`.
    """
    by_key = {s.key: s for s in group_sets}
    cuts = parameter_cuts(model, plan, group_sets)
    lost: dict[str, Tensor] = {}
    for entry in plan.group_entries:
        group_set = by_key[entry.key]
        removed = group_set.kept_to_removed(entry.kept)
        for part in group_set.repairable:
            weight = shards.full(model.get_parameter(part.parameter))
            columns = part.index[removed].flatten().to(weight.device)
            mean = statistics.activations[part.module].mean.to(weight.device)
            given = _mean_output(model.get_submodule(part.module), weight, part.dim, columns, mean)
            lost[part.module] = lost[part.module] + given if part.module in lost else given
    biases: dict[str, Tensor] = {}
    for name, given in lost.items():
        module: Any = model.get_submodule(name)
        present = getattr(module, "bias", None)
        bias = (given if present is None else given + shards.full(present)).to(module.weight.dtype)
        # outputs that are removed themselves take their biases along
        kept = [cut.kept for cut in cuts.get(f"{name}.weight", ()) if cut.dim == output_dim(module)]
        biases[f"{name}.bias"] = bias[kept[0].to(bias.device)] if kept else bias
    added = {
        name.removesuffix(".bias"): value.numel()
        for name, value in biases.items()
        if getattr(model.get_submodule(name[:-5]), "bias", None) is None
    }
    info = dict(plan.info)
    if AFTER in info:
        info[AFTER] += sum(added.values())
    return replace(plan, biases=tuple(sorted({*plan.biases, *added})), info=info), biases


def added_biases(model: nn.Module, group_sets: Sequence[GroupSet]) -> dict[str, int]:
    """The most that :func:`bias_fold` adds to a model: elements of the biases that it gives to layers without one, by layer.

    A layer whose outputs are removed as well, or that nothing is removed of, gets fewer or none.
    """
    found = {}
    for name in dict.fromkeys(part.module for s in group_sets for part in s.repairable):
        module: Any = model.get_submodule(name)
        if getattr(module, "bias", None) is None:
            groups = module.groups if isinstance(module, TRANSPOSED) else 1
            found[name] = module.weight.shape[output_dim(module)] * groups
    return found


def _mean_output(module: Any, weight: Tensor, dim: int, columns: Tensor, mean: Tensor) -> Tensor:
    """What positions along the input dimension of a layer's weight give on average, shape ``(outputs,)``, float64.

    A convolution adds up a channel's mean times the sum of its kernel, which is exact away from padding. In a transposed one
    an output position meets a part of the kernel: on average, one in as many as the steps of its stride.
    """
    if not is_convolution(module):
        part = weight.index_select(dim, columns).double()
        return part.T @ mean[columns] if dim == 0 else part @ mean[columns]
    product = weight.double() * spread_features(mean.double(), weight, dim)
    stay = torch.ones(weight.shape[dim], dtype=torch.bool, device=weight.device)
    stay[columns] = False
    product.index_fill_(dim, stay.nonzero().flatten(), 0.0)
    if not isinstance(module, TRANSPOSED):
        return product.flatten(1).sum(dim=1)
    by_group = product.view(module.groups, -1, *product.shape[1:]).flatten(3).sum(dim=(1, 3))
    return by_group.flatten() / math.prod(module.stride)
