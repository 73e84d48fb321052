"""What modules keep of their parameters from one evaluation to the next, until their mode changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def set_caches_aside(model: nn.Module) -> Callable[[], None]:
    """Empty the dictionaries of tensors of modules whose ``train`` is their own; return what puts back what they were.

    Relative position biases are gathered once and kept in such a dictionary (LeViT, TinyViT), which ``train()`` empties:
    what was computed from other values, or sizes, of the parameters must not be found there.
    """
    before: list[tuple[nn.Module, str, dict[Any, Any]]] = []
    for module in model.modules():
        if type(module).train is nn.Module.train:
            continue
        for name, value in list(vars(module).items()):
            if not name.startswith("_") and type(value) is dict and all(isinstance(v, Tensor) for v in value.values()):
                before.append((module, name, value))
                setattr(module, name, {})

    def put_back() -> None:
        for module, name, value in before:
            setattr(module, name, value)

    return put_back
