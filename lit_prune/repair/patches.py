"""A layer as a product of a matrix with rows of inputs: those of a convolution are the patches that its kernel sees.

A transposed convolution is the convolution, with the kernel turned round, of its input with zeros between the positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lit_prune.architectures.features import feature_dim, is_convolution
from lit_prune.architectures.plain_modules import LINEAR, TRANSPOSED
from lit_prune.torch_internals import padding_of


def is_product(module: nn.Module) -> bool:
    """Whether a layer's output is one matrix times its inputs: a linear layer, or a convolution with one group of channels."""
    return isinstance(module, LINEAR) and (not is_convolution(module) or bool(module.groups == 1))


def taps(module: Any) -> int:
    """Number of places in a layer's kernel, 1 for a linear layer."""
    return int(module.weight.shape[2:].numel())


def matrix_of(module: Any, weight: Tensor) -> Tensor:
    """A layer's weight as the matrix that multiplies :func:`input_rows`.

    Args:
        module: The layer.
        weight: Its weight, or one of other widths.

    Returns:
        Shape ``(outputs, inputs * taps)``, the taps of one input side by side.
    """
    if isinstance(module, Conv1D):
        return weight.T
    if isinstance(module, TRANSPOSED):
        weight = weight.transpose(0, 1).flip(tuple(range(2, weight.dim())))
    return weight.flatten(1)


def weight_of(module: Any, matrix: Tensor) -> Tensor:
    """The weight whose :func:`matrix_of` is a matrix; its widths are those of the matrix, its kernel that of the layer."""
    if isinstance(module, Conv1D):
        return matrix.T.contiguous()
    kernel = module.weight.shape[2:]
    weight = matrix.reshape(len(matrix), -1, *kernel)
    if isinstance(module, TRANSPOSED):
        weight = weight.flip(tuple(range(2, weight.dim()))).transpose(0, 1)
    return weight.contiguous()


def count_rows(module: nn.Module, output: Tensor) -> int:
    """Number of rows that a layer's output has: tokens, or samples and spatial positions together."""
    return output.numel() // max(1, output.shape[feature_dim(module)])


def output_rows(module: nn.Module, output: Tensor, rows: Tensor) -> Tensor:
    """Some rows of a layer's output.

    Args:
        module: The layer.
        output: What it gave.
        rows: Numbers of the rows.

    Returns:
        Shape ``(rows, outputs)``.
    """
    if not is_convolution(module):
        return output.reshape(-1, output.shape[-1])[rows]
    output = output if output.dim() == 1 - feature_dim(module) else output[None]
    sample, *place = torch.unravel_index(rows, (len(output), *output.shape[2:]))
    index: Any = (sample, slice(None), *place)
    return output[index]


def input_rows(
    module: nn.Module, inputs: Tensor, output_shape: Sequence[int], rows: Tensor, kept: Tensor | None
) -> Tensor:
    """What some rows of a layer's output are computed from.

    Args:
        module: The layer, one that :func:`is_product`.
        inputs: What it was called with.
        output_shape: Shape of what it gave.
        rows: Numbers of the rows, as in :func:`output_rows`.
        kept: The input features to take, ascending; all if ``None``.

    Returns:
        Shape ``(rows, features * taps)``, columns as in :func:`matrix_of`.
    """
    if not is_convolution(module):
        chosen = inputs.reshape(-1, inputs.shape[-1])[rows]
        return chosen if kept is None else chosen[:, kept]
    spatial = -1 - feature_dim(module)
    inputs = inputs if inputs.dim() == spatial + 2 else inputs[None]
    windows = _windows(module, inputs if kept is None else inputs[:, kept], output_shape[-spatial:])
    sample, *place = torch.unravel_index(rows, (len(inputs), *output_shape[-spatial:]))
    index: Any = (sample, slice(None), *place)
    return windows[index].flatten(1)


def _windows(module: Any, inputs: Tensor, positions: Sequence[int]) -> Tensor:
    """A view of a padded input by output position, shape ``(batch, channels, *positions, *kernel)``."""
    kernel, dilation = module.kernel_size, module.dilation
    if isinstance(module, TRANSPOSED):
        inputs, steps = _spaced(module, inputs, positions), (1,) * len(kernel)
    else:
        inputs, steps = _padded(module, inputs), module.stride
    for number, (size, gap, step) in enumerate(zip(kernel, dilation, steps, strict=True)):
        inputs = inputs.unfold(2 + number, (size - 1) * gap + 1, step)
    gaps: Any = (..., *(slice(None, None, gap) for gap in dilation))
    return inputs[gaps]


def _padded(module: Any, inputs: Tensor) -> Tensor:
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        padding = padding_of(module)
    else:
        padding = [size for size in reversed(module.padding) for _ in range(2)]
    if module.padding_mode == "zeros":
        return functional.pad(inputs, padding)
    return functional.pad(inputs, padding, mode=module.padding_mode)


def _spaced(module: Any, inputs: Tensor, positions: Sequence[int]) -> Tensor:
    """The input of a transposed convolution, with zeros between its positions and around them."""
    sizes = [(size - 1) * stride + 1 for size, stride in zip(inputs.shape[2:], module.stride, strict=True)]
    spaced = inputs.new_zeros(*inputs.shape[:2], *sizes)
    steps: Any = (..., *(slice(None, None, stride) for stride in module.stride))
    spaced[steps] = inputs
    padding: list[int] = []
    dims = zip(sizes, positions, module.kernel_size, module.dilation, module.padding, strict=True)
    for size, wanted, kernel, gap, cropped in dims:
        reach = gap * (kernel - 1)
        before = reach - cropped
        # as many windows as the output has positions
        padding = [before, wanted + reach - size - before, *padding]
    return functional.pad(spaced, padding)
