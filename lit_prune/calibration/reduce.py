"""Sums over the elements of large tensors, piece by piece, without a temporary of the tensor's size.

A piece is small enough for a processor's cache, so that several operations on it read memory once; on other devices it is
large enough to keep them busy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

CPU_PIECE = 1 << 19
DEVICE_PIECE = 1 << 24


def piece_size(device: torch.device) -> int:
    """Number of elements of a piece on a device."""
    return CPU_PIECE if device.type == "cpu" else DEVICE_PIECE


def pieces(shape: Sequence[int], size: int) -> Iterator[tuple[slice, ...]]:
    """Indices that cut a tensor of some shape into pieces of at most ``size`` elements, along its first dimensions."""
    if math.prod(shape) <= size or not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    if row <= size:
        step = size // row
        yield from ((slice(start, start + step),) for start in range(0, shape[0], step))
        return
    for start in range(shape[0]):
        yield from ((slice(start, start + 1), *rest) for rest in pieces(shape[1:], size))


def add_line(line: Tensor, values: Tensor, dim: int, index: tuple[slice, ...] = ()) -> None:
    """Add to a line, in place, the sums of values over every dimension but one.

    Args:
        line: Tensor of the length of the whole along ``dim``.
        values: A piece of the whole.
        dim: The dimension that stays.
        index: Where in the whole the piece lies, as from :func:`pieces`.
    """
    other = [d for d in range(values.dim()) if d != dim]
    sums = values.sum(dim=other, dtype=line.dtype) if other else values
    line[index[dim] if dim < len(index) else slice(None)] += sums


def product_lines(
    weight: Tensor, gradient: Tensor, wanted: Sequence[tuple[Callable[[Tensor], Tensor], int, Tensor]]
) -> Tensor:
    """Add functions of the product of a weight and its gradient, summed over every dimension but one, to lines.

    Args:
        weight: A parameter.
        gradient: Its gradient, or the mean of several, of the same shape.
        wanted: Functions of the product, element by element, which may change it in place, each with the dimension that
            stays and the float32 line of its length to add to, in place.

    Returns:
        The sum of the gradient, a scalar: not finite if an element is not.
    """
    total = torch.zeros((), dtype=torch.float32, device=gradient.device)
    functions = {function: [(dim, line) for f, dim, line in wanted if f is function] for function, *_ in wanted}
    size = piece_size(weight.device)
    # written over and over: memory fresh from the system costs more than the arithmetic
    scratch = torch.empty(min(size, weight.numel()) if wanted else 0, dtype=torch.float32, device=weight.device)
    for index in pieces(weight.shape, size):
        part = gradient[index]
        total += part.sum(dtype=torch.float32)
        for function, lines in functions.items():
            product = scratch[: part.numel()].view(part.shape)
            values = function(torch.mul(weight[index].float(), part.float(), out=product))
            for dim, line in lines:
                add_line(line, values, dim, index)
    return total
