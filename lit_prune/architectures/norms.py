"""What a norm over features computes, found out from the module itself."""

from __future__ import annotations

import copy

import torch
from torch import nn


@torch.no_grad()
def _probed(norm: nn.Module, weight: float, x: torch.Tensor) -> torch.Tensor:
    """What a copy of a norm gives for an input, with one number for all of its scales and no bias."""
    # the values of the parameters are replaced: they may be on any device, or nowhere
    memo = {id(p): nn.Parameter(torch.zeros(p.shape, dtype=torch.float32)) for p in norm.parameters(recurse=False)}
    probe = copy.deepcopy(norm, memo)
    probe.weight.fill_(weight)  # type: ignore[operator, union-attr]
    return probe(x)


def _spread(norm: nn.Module, mean: float) -> torch.Tensor:
    return torch.linspace(-1.0, 1.0, int(norm.weight.numel()), dtype=torch.float32)[None] + mean  # type: ignore[operator, union-attr, arg-type]


def scale_offset(norm: nn.Module) -> float:
    """Return what a norm adds to its weight: 1 where the weight is the distance of the scale from 1, else 0."""
    return 1.0 if bool(_probed(norm, 0.0, _spread(norm, 0.5)).any()) else 0.0


def subtracts_mean(norm: nn.Module) -> bool:
    """Return whether a norm subtracts the mean over the features, as ``nn.LayerNorm`` does and root-mean-square norms do not."""
    near, far = (_probed(norm, 0.5, _spread(norm, mean)) for mean in (0.0, 3.0))
    return bool(torch.allclose(near, far, atol=1e-3))
