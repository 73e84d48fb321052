"""What a norm over features computes, found out from the module itself."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.architectures.layers import before_layer
from lit_prune.architectures.registry import stream_of
from lit_prune.architectures.stream import norms_over_channels
from lit_prune.modeling_pruned import sync_features


@torch.no_grad()
def _probed(norm: nn.Module, weight: float, x: torch.Tensor) -> torch.Tensor:
    """What a copy of a norm gives for an input, with one number for all of its scales and no bias."""
    # the values of the parameters are replaced: they may be on any device, or nowhere
    memo = {id(p): nn.Parameter(torch.zeros(p.shape, dtype=torch.float32)) for p in norm.parameters(recurse=False)}
    probe = copy.deepcopy(norm, memo)
    probe.weight.fill_(weight)  # type: ignore[operator]
    return probe(x)


def _spread(norm: nn.Module, mean: float) -> torch.Tensor:
    return torch.linspace(-1.0, 1.0, int(norm.weight.numel()), dtype=torch.float32)[None] + mean  # type: ignore[operator]


def scale_offset(norm: nn.Module) -> float:
    """Return what a norm adds to its weight: 1 where the weight is the distance of the scale from 1, else 0."""
    return 1.0 if bool(_probed(norm, 0.0, _spread(norm, 0.5)).any()) else 0.0


def subtracts_mean(norm: nn.Module) -> bool:
    """Return whether a norm subtracts the mean over the features, as ``nn.LayerNorm`` does and root-mean-square norms do not."""
    near, far = (_probed(norm, 0.5, _spread(norm, mean)) for mean in (0.0, 3.0))
    return bool(torch.allclose(near, far, atol=1e-3))


@contextlib.contextmanager
def norms_over_kept(model: nn.Module, names: Iterable[str], kept: Tensor) -> Iterator[None]:
    """Let norms compute what they do with the kept channels alone: over these, and zeros for the others. Undone at the end.

    Args:
        model: The model.
        names: Names of norms over all channels.
        kept: Indices of the channels that count, ascending, shape ``(kept,)``.
    """

    def narrow(_: nn.Module, inputs: Tensor) -> Tensor:
        return inputs.index_select(-1, kept.to(inputs.device))

    def widen(width: int, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        whole = output.new_zeros((*output.shape[:-1], width))
        return whole.index_copy(-1, kept.to(output.device), output)

    with contextlib.ExitStack() as stack, torch.no_grad():
        for module in (model.get_submodule(name) for name in names):
            for parameter in module.parameters(recurse=False):
                stack.callback(_put_back, module, parameter, parameter.data)
                width = len(parameter)
                parameter.data = parameter.data[kept.to(parameter.device)]
            sync_features(module)
            stack.callback(before_layer(module, narrow).remove)
            stack.callback(module.register_forward_hook(lambda m, a, o, width=width: widen(width, m, a, o)).remove)
        yield


def _put_back(module: nn.Module, parameter: nn.Parameter, data: Tensor) -> None:
    parameter.data = data
    sync_features(module)


def stream_norms(model: nn.Module) -> list[str]:
    """Names of the norms over the model's hidden channels; none if its stream is not described."""
    return norms_over_channels(model, stream_of(model))
