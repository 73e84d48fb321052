"""Cutting tensors along dimensions, restoring them bit for bit, and letting a tensor object change its size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


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
        full.index_copy_(cut.dim, cut.removed.to(tensor.device), part.to(tensor.device))
        tensor = full
    return tensor


def _in_cpu_memory(tensor: Tensor) -> Tensor:
    # one on the meta device has no values
    return tensor if tensor.is_meta else tensor.cpu()


class UndoCut:
    """Gives a tensor its values from before a cut again; what it holds on to for that is in CPU memory.

    Args:
        tensor: The tensor object, not cut yet.
        cuts: The cuts.
        stayed: What stays of its values.
        removed: What is removed, see :func:`cut_tensor`.
        replaced: Whether the tensor gets other values than ``stayed``; if not, it holds them itself.
    """

    def __init__(
        self, tensor: Tensor, cuts: Sequence[DimensionCut], stayed: Tensor, removed: Sequence[Tensor], *, replaced: bool
    ) -> None:
        self._tensor, self._cuts, self._device = tensor, cuts, tensor.device
        self._removed = [_in_cpu_memory(part) for part in removed]
        self._replaced = replaced
        self._stayed: Tensor | None = _in_cpu_memory(stayed) if replaced else stayed
        self._whole: Tensor | None = None

    def settle(self) -> None:
        """Let go, after the cut, of what the tensor holds itself until another cut replaces it."""
        if not self._replaced:
            self._stayed = None

    def __call__(self) -> None:
        """Put the values back; cuts that came later are undone already."""
        if self._whole is None:
            stayed = self._tensor.data if self._stayed is None else self._stayed.to(self._device)
            self._whole = paste_tensor(stayed, self._cuts, self._removed)
        set_data(self._tensor, self._whole)


def move_to_cpu(tensors: Iterable[Tensor]) -> Callable[[], None]:
    """Move the values of tensors, which stay the objects they are, to CPU memory; return a function that moves them back."""
    moved = [(t, t.device) for t in tensors if t.device.type not in ("cpu", "meta") and not isinstance(t, DTensor)]

    def undo() -> None:
        for tensor, device in moved:
            tensor.data = tensor.data.to(device)

    for tensor, _ in moved:
        tensor.data = tensor.data.cpu()
    return undo


def set_data(tensor: Tensor, data: Tensor) -> None:
    """Let a tensor object hold other values of another shape; whoever holds the object sees them, hooks stay.

    The node of the autograd graph that accumulates a parameter's gradient remembers the shape that the parameter had when
    the node was made. PyTorch makes a new node only where the data type changes, so the type changes on the way.
    """
    if tensor.is_leaf and tensor.is_floating_point():
        other = torch.float32 if tensor.dtype != torch.float32 else torch.bfloat16
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data
    # an autocast around it would go on with its copy in 16 bits of the values before
    torch.clear_autocast_cache()
