"""Calls of whole blocks (decoder layers): what goes in, what comes out, and passing them over."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def hidden_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states that a block is called with."""
    return args[0] if args else kwargs["hidden_states"]


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
