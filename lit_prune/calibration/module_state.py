"""What a forward pass may leave in a module beside weights: buffers, counters, hidden states that it carries along."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@contextlib.contextmanager
def module_state_kept(root: nn.Module) -> Iterator[None]:
    """Put buffers and attributes of a module and of all within it back, also after an error; parameters are left alone.

    Buffers and tensors among the attributes get their values back as well, lists, dictionaries, sets and deques their items; what
    is further down is not looked at.

    Args:
        root: The module.
    """
    restores = [restore for module in root.modules() for restore in _restores(module)]
    try:
        yield
    finally:
        for restore in restores:
            restore()


def _restores(module: nn.Module) -> Iterator[Callable[[], None]]:
    buffers = dict(module.named_buffers(recurse=False))
    attributes = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}

    def references() -> None:
        present = dict(module.named_buffers(recurse=False))
        for name in present.keys() | buffers.keys():
            if present.get(name) is not buffers.get(name):
                setattr(module, name, buffers.get(name))
        for name in vars(module).keys() - _OF_EVERY_MODULE - attributes.keys():
            del vars(module)[name]
        vars(module).update(attributes)

    yield references
    for value in (*buffers.values(), *attributes.values()):
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            if not (value.is_meta or value.is_inference()):
                yield _tensor(value)
        elif type(value) in (list, dict, set, deque):
            yield _container(value)


def _tensor(tensor: Tensor) -> Callable[[], None]:
    data, values = tensor.data, tensor.detach().clone()

    def restore() -> None:
        with torch.no_grad():
            tensor.data = data
            tensor.copy_(values)

    return restore


def _container(container: Any) -> Callable[[], None]:
    items = list(container.items()) if isinstance(container, dict) else list(container)
    return lambda: refill(container, items)


def refill(container: Any, items: list[Any]) -> None:
    """Give a container its old items back, if it has others now: someone may be going through it.

    Args:
        container: A dictionary, list, set, deque or bytearray, or one of a class derived from these.
        items: Its old items; pairs of key and value for a dictionary.
    """
    if isinstance(container, dict):
        now = list(container.items())
        if len(now) == len(items) and all(a[0] is b[0] and a[1] is b[1] for a, b in zip(now, items, strict=True)):
            return
        # past what a subclass makes of it
        kind: Any = OrderedDict if isinstance(container, OrderedDict) else dict
        kind.clear(container)
        for key, value in items:
            kind.__setitem__(container, key, value)
        return
    now = list(container)
    if len(now) == len(items) and all(a is b for a, b in zip(now, items, strict=True)):
        return
    if isinstance(container, list):
        list.__setitem__(container, slice(None), items)
    elif isinstance(container, bytearray):
        container[:] = bytes(items)
    elif isinstance(container, set):
        set.clear(container)
        set.update(container, items)
    else:
        deque.clear(container)
        deque.extend(container, items)
