"""A module's own view of a config that it shares with others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lit_prune.modeling_pruned import overridden


def override_config(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Let a module, and no other, see a value of its own for a field of its config; return a function that undoes this."""
    before: Any = module.config
    module.config = overridden(before, name, value)  # type: ignore[assignment]

    def undo() -> None:
        module.config = before

    return undo
