"""Calls of layers and of whole blocks (decoder layers): what goes in, what comes out, and passing them over."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_prune.errors import UnsupportedModelError


def first_tensor(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor that a module is called with, in the order of its ``forward``; ``None`` if there is none."""
    place = _first_place(module, args, kwargs)
    return None if place is None else args[place] if isinstance(place, int) else kwargs[place]


def with_first_tensor(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], tensor: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with another tensor in place of the first."""
    place = _first_place(module, args, kwargs)
    if isinstance(place, int):
        return (*args[:place], tensor, *args[place + 1 :]), dict(kwargs)
    return tuple(args), {**kwargs, place: tensor} if place is not None else dict(kwargs)


def _first_place(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | str | None:
    """Position or keyword of the first tensor."""
    for place, value in enumerate(args):
        if isinstance(value, Tensor):
            return place
    names = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
    if len(names) < 2:
        return names[0] if names else None
    order = [name for name in inspect.signature(module.forward).parameters if name in names]
    return order[0] if order else names[0]


def before_layer(layer: nn.Module, hook: Callable[[nn.Module, Tensor], Tensor | None]) -> RemovableHandle:
    """Call a hook with a layer and its input before every call of the layer; a tensor that the hook gives takes its place.

    Args:
        layer: A module that computes something of one tensor, which is the first that it is called with.
        hook: The hook.

    Returns:
        The handle that takes the hook off. A call of the layer without a tensor raises an ``UnsupportedModelError``.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = hook(module, _input(module, args, kwargs))
        return None if changed is None else with_first_tensor(module, args, kwargs, changed)

    return layer.register_forward_pre_hook(before, with_kwargs=True)


def after_layer(layer: nn.Module, hook: Callable[[nn.Module, Tensor, Any], None]) -> RemovableHandle:
    """Call a hook with a layer, its input and its output after every call of the layer.

    Args:
        layer: As for :func:`before_layer`.
        hook: The hook.

    Returns:
        The handle that takes the hook off. A call of the layer without a tensor raises an ``UnsupportedModelError``.
    """

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hook(module, _input(module, args, kwargs), output)

    return layer.register_forward_hook(after, with_kwargs=True)


def _input(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    found = first_tensor(module, args, kwargs)
    if found is None:
        raise UnsupportedModelError(
            f"A {type(module).__name__} was called with {[type(a).__name__ for a in args]} and {sorted(kwargs)}; expected a"
            " tensor."
        )
    return found


def hidden_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states that a block is called with.

    Raises:
        UnsupportedModelError: If they are neither its first argument nor ``hidden_states=``.
    """
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise UnsupportedModelError(
            f"A block was called with {[type(a).__name__ for a in args]} and {sorted(kwargs)}; expected hidden states, a tensor,"
            " as its first argument or as hidden_states=."
        )
    return hidden


def hidden_output(output: Any) -> Tensor:
    """The hidden states that a block gives."""
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def passed_over(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Let blocks give the hidden states that they are called with, as if they were not there."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = hidden_input(args, kwargs)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with contextlib.ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield
