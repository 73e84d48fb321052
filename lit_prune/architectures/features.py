"""Where the input features of a layer lie: in its input, and in its weight.

A feature of a linear layer is a position along the last dimension of its input, one of a convolution a channel; every
spatial position of a convolution's input is a sample of its channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_prune.architectures.plain_modules import CONVOLUTIONS, TRANSPOSED


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution of torch, transposed or not."""
    return isinstance(module, (*CONVOLUTIONS, *TRANSPOSED))


def feature_dim(module: nn.Module) -> int:
    """The dimension of a layer's input, and of its output, that the features lie along, counted from the end."""
    return -1 - len(module.kernel_size) if is_convolution(module) else -1  # type: ignore[arg-type]


def output_dim(module: nn.Module) -> int:
    """The dimension of a layer's weight that its outputs lie along."""
    return 1 if isinstance(module, (Conv1D, *TRANSPOSED)) else 0


def input_features(module: nn.Module, index: Tensor, dim: int) -> Tensor:
    """The input features that positions along a dimension of a layer's weight are multiplied with.

    Args:
        module: The layer.
        index: Positions along ``dim``, the input dimension of the weight, by group, shape ``(groups, width)``.
        dim: That dimension.

    Returns:
        Features by group. A position of a convolution in G groups of channels stands for one channel in each of these, so
        that the shape is ``(groups, width * G)``; for all other layers it is ``index`` itself.
    """
    # the weight of a transposed convolution has all input channels along its first dimension
    if dim == 0 or not is_convolution(module) or module.groups == 1:
        return index
    groups: int = module.groups  # type: ignore[assignment]
    each: int = module.weight.shape[1]  # type: ignore[index, assignment]
    return torch.cat([index + each * number for number in range(groups)], dim=1)


def spread_features(values: Tensor, weight: Tensor, input_dim: int) -> Tensor:
    """A number for every input feature in a shape that broadcasts against the weight that multiplies the features.

    Args:
        values: Shape ``(features,)``.
        weight: The weight.
        input_dim: Its dimension that meets the features. That of a convolution in G groups of channels is G times
            shorter than there are features: the first rows read the first of them.
    """
    length = weight.shape[input_dim]
    shape = [1] * weight.dim()
    shape[input_dim] = length
    if values.numel() == length or not length:
        return values.view(shape)
    groups = values.numel() // length
    shape[0] = len(weight)
    return values.view(groups, length).repeat_interleave(len(weight) // groups, dim=0).view(shape)
