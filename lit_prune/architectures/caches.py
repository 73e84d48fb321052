"""What modules keep of their parameters from one evaluation to the next, until their mode changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn


def set_caches_aside(model: nn.Module, journal: list[Callable[[], None]]) -> None:
    """Empty the dictionaries of tensors of modules whose ``train`` is their own.

    Relative position biases are gathered once and kept in such a dictionary (LeViT, TinyViT), which ``train()`` empties:
    what was computed from other values, or sizes, of the parameters must not be found there.

    Args:
        model: The model.
        journal: Gets what puts back what they were, before anything is changed.
    """
    before = [(module, name, value) for module in model.modules() for name, value in _caches(module)]

    def put_back() -> None:
        for module, name, value in before:
            setattr(module, name, value)

    journal.append(put_back)
    for module, name, _ in before:
        setattr(module, name, {})


@contextlib.contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Let such modules compute anew, with a graph of its own, in every call; what they kept is there again at the end."""
    journal: list[Callable[[], None]] = []
    handles = [m.register_forward_pre_hook(_forget) for m in model.modules() if next(_caches(m), None) is not None]
    try:
        set_caches_aside(model, journal)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for put_back in journal:
            put_back()


def _caches(module: nn.Module) -> Iterator[tuple[str, dict[Any, Any]]]:
    if type(module).train is nn.Module.train:
        return
    for name, value in list(vars(module).items()):
        if not name.startswith("_") and type(value) is dict and all(isinstance(v, Tensor) for v in value.values()):
            yield name, value


def _forget(module: nn.Module, _: Any) -> None:
    for name, _value in _caches(module):
        setattr(module, name, {})
