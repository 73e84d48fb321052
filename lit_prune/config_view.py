"""A module's own view of a config that it shares with others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


class ConfigView:
    """One module's view of a config that it shares with others: some fields are its own, the rest is the shared config's.

    Args:
        shared: The shared config.
        overrides: The module's own fields.
    """

    def __init__(self, shared: Any, overrides: Mapping[str, Any]) -> None:
        object.__setattr__(self, "shared", shared)
        object.__setattr__(self, "overrides", dict(overrides))

    def __getattr__(self, name: str) -> Any:
        if name in ("shared", "overrides") or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return self.overrides[name] if name in self.overrides else getattr(self.shared, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.shared, name, value)


def override_config(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Let a module, and no other, see a value of its own for a field of its config; return a function that undoes this."""
    before: Any = module.config
    shared, overrides = (before.shared, before.overrides) if isinstance(before, ConfigView) else (before, {})
    module.config = ConfigView(shared, {**overrides, name: value})  # type: ignore[assignment]

    def undo() -> None:
        module.config = before

    return undo
