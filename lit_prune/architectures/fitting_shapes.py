"""The adaptation of modules that reshape to the width of their input, where fewer heads are narrower than that."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_prune.architectures.adaptations import Adapted, become, nothing_to_undo

_RESHAPES = (Tensor.reshape, Tensor.view, torch.reshape)


class _LastSizeFits(TorchFunctionMode):
    """Lets the last size of a shape follow where the elements are not as many as the shape says."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RESHAPES and len(args) > 1 and not kwargs:
            sizes = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
            if all(isinstance(s, int | torch.SymInt) for s in sizes) and _misfits(args[0], sizes):
                return func(args[0], (*sizes[:-1], -1))
        return func(*args, **kwargs)


def _misfits(tensor: Tensor, sizes: Any) -> bool:
    if any(isinstance(s, int) and s < 0 for s in sizes):
        return False
    return bool(math.prod(sizes) != tensor.numel())


class FittingShapes(Adapted):
    """Mixed into the class of a module whose forward reshapes what its heads give to the width of its input."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of the class that this is mixed into, but the last size of ``x.reshape(batch, tokens, width)`` follows ``x``."""
        with _LastSizeFits():
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def fitting_shapes(module: nn.Module, kept: Tensor) -> Callable[[], None]:
    """The adaptation (see :class:`~lit_prune.groups.Adaptation`) of a module that reshapes to the width of its input."""
    if isinstance(module, FittingShapes):
        return nothing_to_undo
    return become(module, FittingShapes)
