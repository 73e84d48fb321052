"""What takes the place of loggers and callbacks while something runs inside a fit that is to leave no trace.

The user's hooks may ask them where a log lies, or which checkpoint is best: they answer as what they stand for, but do nothing.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger, Logger


class _StandIn:
    """Passes for an instance of another object's class: by it the trainer chooses folders, and finds checkpoint callbacks."""

    _original: Any

    @property
    def __class__(self) -> Any:
        """The other object's."""
        return type(self._original)

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError("The class of a stand-in is that of what it stands for.")


class SilentLogger(_StandIn, DummyLogger):
    """Logs nothing, and says where another logger writes.

    Args:
        logger: The other logger.
    """

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._original = logger

    @property
    def name(self) -> Any:
        """The other logger's."""
        return self._original.name

    @property
    def version(self) -> Any:
        """The other logger's."""
        return self._original.version

    @property
    def save_dir(self) -> Any:
        """The other logger's."""
        return self._original.save_dir

    @property
    def root_dir(self) -> Any:
        """The other logger's, if it has one."""
        return getattr(self._original, "root_dir", None)

    @property
    def log_dir(self) -> Any:
        """The other logger's, if it has one."""
        return getattr(self._original, "log_dir", None)


class InertCallback(_StandIn, pl.Callback):
    """Has the attributes of a callback, and hooks that do nothing.

    Args:
        callback: The callback.
    """

    def __init__(self, callback: pl.Callback) -> None:
        self._original = callback

    def __getattr__(self, name: str) -> Any:
        if name == "_original":
            # a copy, before it has its attributes
            raise AttributeError(name)
        return getattr(self._original, name)
