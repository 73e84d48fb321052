"""The adaptations of modules that reshape to sizes of the dense model: to the width of their input, or to its channels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_prune.architectures.adaptations import Adapted, become, nothing_to_undo

_RESHAPES = (Tensor.reshape, Tensor.view, torch.reshape)
_UNFLATTENS = (Tensor.unflatten, torch.unflatten)


class _LastSizeFits(TorchFunctionMode):
    """Lets the last size of a shape follow where the elements are not as many as the shape says."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RESHAPES and len(args) > 1 and not kwargs:
            sizes = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
            if all(isinstance(s, int | torch.SymInt) for s in sizes):
                sizes = _known(args[0].shape, sizes)
                if _misfits(args[0], sizes):
                    return func(args[0], (*sizes[:-1], -1))
        return func(*args, **kwargs)


def _known(shape: Any, sizes: Any) -> Any:
    """The sizes with the number of tokens in the place of -1, where features are split and what stands before them stays."""
    at = sizes.index(-1) if -1 in sizes else len(sizes)
    if not 0 < at < len(shape) - 1 or len(sizes) <= len(shape) or tuple(sizes[:at]) != tuple(shape[:at]):
        return sizes
    return (*sizes[:at], shape[at], *sizes[at + 1 :])


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


class _ChannelsFit(TorchFunctionMode):
    """Lets the second size of a shape follow where the elements of a sample are not as many as the shape says."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RESHAPES and len(args) > 1 and not kwargs:
            sizes = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
            if len(sizes) > 2 and all(isinstance(s, int | torch.SymInt) for s in sizes):
                return func(args[0], _with_channels(args[0].shape, sizes))
        if (
            func in _UNFLATTENS
            and len(args) == 3
            and not kwargs
            and len(args[2]) > 1
            and args[1] in (1, 1 - args[0].dim())
        ):
            shape = args[0].shape
            sizes = _with_channels(shape, (shape[0], *args[2], *shape[2:]))
            return func(args[0], args[1], tuple(sizes[1 : 1 + len(args[2])]))
        return func(*args, **kwargs)


def _with_channels(shape: Any, sizes: Any) -> Any:
    """The sizes; if they say the batch and do not fit, or would change it, with as many channels as there are."""
    rest = math.prod(sizes[2:])
    if rest <= 0 or sizes[1] <= 0 or sizes[0] not in (-1, shape[0]):
        return sizes
    return sizes if sizes[1] * rest == math.prod(shape[1:]) else (shape[0], -1, *sizes[2:])


class FittingChannels(Adapted):
    """Mixed into the class of a module whose forward makes images of rows: ``x.view(-1, 128, 7, 7)``, ``nn.Unflatten``."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of the class that this is mixed into, but the number of channels follows the elements of a sample."""
        with _ChannelsFit():
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def fitting_channels(module: nn.Module, kept: Tensor) -> Callable[[], None]:
    """The adaptation (see :class:`~lit_prune.groups.Adaptation`) of a module that reshapes rows to so many channels."""
    if isinstance(module, FittingChannels):
        return nothing_to_undo
    return become(module, FittingChannels)
