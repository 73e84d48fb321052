"""The integers by which PyTorch's own modules remember the sizes of their parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lit_prune.modeling_pruned import sync_features
from lit_prune.torch_internals import AnyConvolution, AnyRunningNorm, AnyTransposedConvolution, tables


def sync_sizes(module: nn.Module) -> Callable[[], None]:
    """Make the integers of a module of PyTorch agree with its parameters and buffers; return a function that undoes this.

    Modules of other classes stay as they are. Where a convolution or norm works in groups of channels, the channels of one
    group stay as many as they were.

    Args:
        module: The module, whose parameters were cut.
    """
    before = {n: v for n, v in vars(module).items() if isinstance(v, int | tuple)}
    if not isinstance(module, AnyConvolution):
        sync_features(module)
    parameters, buffers, _ = tables(module)
    tensors: dict[str, Any] = {**parameters, **buffers}
    weight = tensors.get("weight")
    if isinstance(module, AnyConvolution) and weight is not None:
        _convolution(module, tuple(weight.shape))
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        width = module.num_channels // module.num_groups
        module.num_channels, module.num_groups = len(weight), len(weight) // width
    elif isinstance(module, AnyRunningNorm):
        first = next((t for t in (weight, tensors.get("running_mean")) if t is not None), None)
        module.num_features = module.num_features if first is None else len(first)
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag) and weight is not None:
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.Bilinear) and weight is not None:
        module.out_features, module.in1_features, module.in2_features = weight.shape
    elif isinstance(module, nn.PReLU) and weight is not None:
        module.num_parameters = len(weight)
    elif isinstance(module, nn.RNNBase):
        projected = module.proj_size > 0
        module.input_size = tensors["weight_ih_l0"].shape[1]
        gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
        module.hidden_size = tensors["weight_ih_l0"].shape[0] // gates
        if projected:
            module.proj_size = tensors["weight_hh_l0"].shape[1]
    elif isinstance(module, nn.RNNCellBase):
        module.hidden_size, module.input_size = tensors["weight_hh"].shape[1], tensors["weight_ih"].shape[1]

    def undo() -> None:
        for name, value in before.items():
            setattr(module, name, value)

    return undo


def _convolution(module: AnyConvolution, shape: tuple[int, ...]) -> None:
    transposed = isinstance(module, AnyTransposedConvolution)
    if module.groups == 1:
        module.in_channels, module.out_channels = (shape[0], shape[1]) if transposed else (shape[1], shape[0])
        return
    # the dimension of the weight that runs over all groups of channels, and how many of it one group has
    width = (module.in_channels if transposed else module.out_channels) // module.groups
    module.groups = shape[0] // width
    across, within = shape[0], shape[1] * module.groups
    module.in_channels, module.out_channels = (across, within) if transposed else (within, across)
