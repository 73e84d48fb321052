"""What takes the place of loggers and callbacks while something runs inside a fit that is to leave no trace.

The user's hooks may ask them where a log lies, or which checkpoint is best: they answer as what they stand for, but do nothing.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger, Logger


class SilentLogger(DummyLogger):
    """Logs nothing, and says where another logger writes.

    Args:
        logger: The other logger.
    """

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    @property
    def __class__(self) -> Any:
        """The class of the other logger, by which the trainer chooses its folder."""
        return type(self._logger)

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError("The class of a stand-in is that of what it stands for.")

    @property
    def name(self) -> Any:
        """The other logger's."""
        return self._logger.name

    @property
    def version(self) -> Any:
        """The other logger's."""
        return self._logger.version

    @property
    def save_dir(self) -> Any:
        """The other logger's."""
        return self._logger.save_dir

    @property
    def root_dir(self) -> Any:
        """The other logger's, if it has one."""
        return getattr(self._logger, "root_dir", None)

    @property
    def log_dir(self) -> Any:
        """The other logger's, if it has one."""
        return getattr(self._logger, "log_dir", None)


class InertCallback(pl.Callback):
    """Has the attributes of a callback, and hooks that do nothing.

    Args:
        callback: The callback.
    """

    def __init__(self, callback: pl.Callback) -> None:
        self._callback = callback

    @property
    def __class__(self) -> Any:
        """The class of the callback, by which the trainer finds its checkpoint callbacks."""
        return type(self._callback)

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError("The class of a stand-in is that of what it stands for.")

    def __getattr__(self, name: str) -> Any:
        if name == "_callback":
            # a copy, before it has its attributes
            raise AttributeError(name)
        return getattr(self._callback, name)
