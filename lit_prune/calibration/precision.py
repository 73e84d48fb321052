"""The precision that a model runs in, and how to keep it out of sums."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

_LOSS_SCALE: ContextVar[float] = ContextVar("lit_prune_loss_scale", default=1.0)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to sum values of a dtype in: float32, or the dtype itself if it is wider."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Precision:
    """What PyTorch makes of a computation besides the dtypes of its inputs: autocast and the default dtype.

    Args:
        device: Type of the device.
        autocast: The dtype of autocast there, ``None`` if it is off.
        default: The dtype of new tensors for which none is named.
    """

    device: str
    autocast: torch.dtype | None
    default: torch.dtype

    @classmethod
    def current(cls, device: torch.device) -> Precision:
        """Return the precision in force for a device."""
        enabled = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
        return cls(device.type, torch.get_autocast_dtype(device.type) if enabled else None, torch.get_default_dtype())

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Compute in this precision."""
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(self.default)
            if self.autocast is None:
                with without_autocast(torch.device(self.device)):
                    yield
                return
            # no cache: a repair changes weights in place between two calls, and the cache would not know
            with torch.autocast(self.device, dtype=self.autocast, cache_enabled=False):
                yield
        finally:
            torch.set_default_dtype(before)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which a device computes in the dtypes of its tensors."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """Return :math:`a^Tb` in the dtype of both, also under autocast, which multiplies in 16 bits."""
    with without_autocast(a.device):
        return a.T @ b


@contextlib.contextmanager
def scaled_loss(scale: float) -> Iterator[None]:
    """Say that losses come multiplied by a number, so that small gradients survive float16.

    Gradients of parameters are expected unscaled (a hook of theirs can divide them); gradients of activations are not.

    Args:
        scale: The number.
    """
    token = _LOSS_SCALE.set(scale)
    try:
        yield
    finally:
        _LOSS_SCALE.reset(token)


def loss_scale() -> float:
    """Return what gradients of activations are multiplied by in calibration; an observer that reads them divides by it.

    To be called before the backward pass: autograd's threads do not know.
    """
    return _LOSS_SCALE.get()
