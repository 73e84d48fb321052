"""Which layers with a forward of their own multiply each feature of their input with its column of their weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.architectures.features import feature_dim, output_dim, spread_features
from lit_prune.architectures.layers import first_tensor, with_first_tensor
from lit_prune.architectures.plain_modules import class_forward, has_own_forward
from lit_prune.architectures.tracing.difference import difference
from lit_prune.architectures.tracing.trial import telling_values


def unlike_their_weights(model: nn.Module, run: Callable[[], Any]) -> set[str]:
    """Names of the layers that give something else without some input features than without their columns of the weight.

    A layer whose forward pads its input is none of them, one that rolls its features, or norms its weight, is. Only layers
    of derived classes with a forward of their own are looked at, at their first call.

    Args:
        model: The model.
        run: Runs a batch through it.
    """
    layers = {name: module for name, module in model.named_modules() if has_own_forward(module)}
    if not layers:
        return set()
    alike: dict[str, bool] = {}

    def look(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        if name not in alike:
            alike[name] = _is_alike(module, args, kwargs)

    handles = [m.register_forward_hook(partial(look, name), with_kwargs=True) for name, m in layers.items()]
    try:
        with telling_values(model), torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {name for name, same in alike.items() if not same}


def _is_alike(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    weight, inputs = module.weight, first_tensor(module, args, kwargs)
    if inputs is None or not isinstance(weight, nn.Parameter):
        return False
    features = inputs.shape[feature_dim(module)]
    mask = torch.rand(features, generator=torch.Generator().manual_seed(0)).round().to(weight.device)
    before = weight.data
    try:
        of_inputs = spread_features(mask, inputs, feature_dim(module)).to(inputs.dtype)
        masked_args, masked_kwargs = with_first_tensor(module, args, kwargs, inputs * of_inputs)
        without_features = class_forward(module)(*masked_args, **masked_kwargs)
        weight.data = before * spread_features(mask, before, 1 - output_dim(module)).to(before.dtype)
        without_columns = class_forward(module)(*args, **kwargs)
    # whatever the user's forward raises, and shapes that are not those of a layer
    except Exception:
        return False
    finally:
        weight.data = before
    same_kind = isinstance(without_features, Tensor) and isinstance(without_columns, Tensor)
    return same_kind and difference([without_columns], [without_features]) is None
