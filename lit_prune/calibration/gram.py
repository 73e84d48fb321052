"""Products of rows, added up in place and in float32 or wider, whatever the rows are in.

Rows of 16 bits are multiplied as they are where the device can give the result in float32 (CUDA); elsewhere they are made
wider a piece at a time. Of the product of rows with themselves one half is computed; the other is its mirror image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lit_prune.calibration.precision import accumulation_dtype, without_autocast
from lit_prune.calibration.reduce import piece_size

# rows that are made wider at a time, at least: each piece reads and writes the whole sum
_FEWEST_ROWS = 1 << 10
# width of the strips in which one half of a product is computed
_CPU_STRIP, _DEVICE_STRIP = 1 << 8, 1 << 10


@functools.cache
def multiplies_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a device multiplies matrices of a 16-bit dtype with a result in float32."""
    if device.type == "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    try:
        square = torch.zeros(16, 16, device=device, dtype=dtype)
        torch.mm(square, square, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


@torch.no_grad()
def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    r"""Add :math:`a^Tb` to a total in place.

    Args:
        total: Float32 or wider, shape ``(width of a, width of b)``.
        a: Shape ``(rows, width)``, of any floating dtype.
        b: Shape ``(rows, width)``, likewise.
    """
    with without_autocast(total.device):
        for left, right in _pieces(total, a, b):
            _add(total, left, right)


class Gram:
    """The sum of :math:`X^TX` over rows, of which one half is computed.

    Args:
        width: Width of a row.
        device: Where the rows are.
        dtype: What to add up in, float32 or wider.
    """

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        self._sum = torch.zeros(width, width, device=device, dtype=dtype)
        self._mirrored = True

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Add rows.

        Args:
            rows: Shape ``(rows, width)``, of any floating dtype.
        """
        self._mirrored = False
        with without_autocast(rows.device):
            for piece, _ in _pieces(self._sum, rows, rows):
                for strip in self._strips():
                    # from the diagonal on
                    _add(self._sum[strip, strip.start :], piece[:, strip], piece[:, strip.start :])

    @property
    def matrix(self) -> Tensor:
        """The sum so far, shape ``(width, width)``; not a copy."""
        if not self._mirrored:
            for strip in self._strips():
                self._sum[strip.stop :, strip] = self._sum[strip, strip.stop :].T
                corner = self._sum[strip, strip]
                corner.copy_(corner.triu() + corner.triu(1).T)
            self._mirrored = True
        return self._sum

    def replace(self, function: Callable[[Tensor], Tensor]) -> None:
        """Let the sum be what a function makes of it: that over processes, for instance.

        Args:
            function: Takes the whole sum, and gives one of its shape.
        """
        self._sum = function(self.matrix)

    def _strips(self) -> Iterator[slice]:
        width = len(self._sum)
        step = _CPU_STRIP if self._sum.device.type == "cpu" else _DEVICE_STRIP
        yield from (slice(start, min(start + step, width)) for start in range(0, width, step))


def real_rows(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | int]:
    """Return values as rows, zero where a token is padding, and how many rows are not.

    Rows of zeros add nothing to a product. To leave them out would wait for the device to say how many there are.

    Args:
        values: Shape ``(..., width)``.
        mask: True for tokens that count, of the shape of ``values`` without its last dimension; all count if it is ``None`` or
            of another shape.
    """
    if mask is None or mask.shape != values.shape[:-1]:
        return values.reshape(-1, values.shape[-1]), values.shape[:-1].numel()
    return values.where(mask[..., None], 0).reshape(-1, values.shape[-1]), mask.sum()


def _pieces(total: Tensor, a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows as they are multiplied: all at once, or made wider a piece at a time."""
    wide = torch.promote_types(accumulation_dtype(a.dtype), b.dtype)
    if a.dtype == b.dtype and (a.dtype == wide or multiplies_into_float32(total.device, a.dtype)):
        yield a, b
        return
    step = max(_FEWEST_ROWS, piece_size(a.device) // max(1, a.shape[1], b.shape[1]))
    for left, right in zip(a.split(step), b.split(step), strict=True):
        widened = left.to(wide)
        yield widened, widened if b is a else right.to(wide)


def _add(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a.T, b)
    elif a.dtype == accumulation_dtype(a.dtype):
        total.add_(a.T @ b)
    else:
        total.add_(torch.mm(a.T, b, out_dtype=torch.float32))
