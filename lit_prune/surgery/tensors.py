"""Cutting tensors along dimensions, restoring them bit for bit, and letting a tensor object change its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class DimensionCut:
    """What stays and what is removed along one dimension of a parameter.

    Args:
        dim: The dimension.
        kept: Positions that stay, ascending.
        removed: Positions that are removed, ascending.
    """

    dim: int
    kept: Tensor
    removed: Tensor


def cut_tensor(tensor: Tensor, cuts: Sequence[DimensionCut]) -> tuple[Tensor, list[Tensor]]:
    """The smaller tensor, and the removed parts, from which :func:`paste_tensor` restores it bit for bit."""
    removed = []
    for cut in cuts:
        removed.append(tensor.index_select(cut.dim, cut.removed.to(tensor.device)))
        tensor = tensor.index_select(cut.dim, cut.kept.to(tensor.device))
    return tensor, removed


def paste_tensor(tensor: Tensor, cuts: Sequence[DimensionCut], removed: Sequence[Tensor]) -> Tensor:
    """The tensor that :func:`cut_tensor` cut."""
    for cut, part in zip(reversed(cuts), reversed(removed), strict=True):
        shape = list(tensor.shape)
        shape[cut.dim] = len(cut.kept) + len(cut.removed)
        full = tensor.new_empty(shape)
        full.index_copy_(cut.dim, cut.kept.to(tensor.device), tensor)
        full.index_copy_(cut.dim, cut.removed.to(tensor.device), part)
        tensor = full
    return tensor


def set_data(tensor: Tensor, data: Tensor) -> None:
    """Let a tensor object hold other values of another shape; whoever holds the object sees them, hooks stay.

    The node of the autograd graph that accumulates a parameter's gradient remembers the shape that the parameter had when
    the node was made. PyTorch makes a new node only where the data type changes, so the type changes on the way.
    """
    if tensor.is_leaf and tensor.is_floating_point():
        other = torch.float32 if tensor.dtype != torch.float32 else torch.bfloat16
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data
