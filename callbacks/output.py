"""Folders that a run writes to: checked before any work, and no reason to end the run later."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from safetensors import SafetensorError

from lit_prune._files import check_writable
from lit_prune.callbacks.ranks import ranks_of
from lit_prune.distributed.ranks import together
from lit_prune.errors import PruningError
from lit_prune.text_escape import one_line


def check_on_rank_zero(trainer: pl.Trainer, check: Callable[[], None], about: str = "") -> None:
    """Raise on every rank if a check fails on rank zero, the only one that runs it.

    Args:
        trainer: The trainer.
        check: Raises a PruningError if something is wrong.
        about: What the message begins with.

    Raises:
        PruningError: With the message of the check. Any other error of the check is raised, too: on the other ranks as a
            :class:`RankError`.
    """
    ranks = ranks_of(trainer)
    message: str | None = None
    with together(ranks, "the checks before training"):
        if trainer.is_global_zero:
            try:
                check()
            except PruningError as error:
                message = str(error)
        message = message if ranks is None else ranks.gather(message)[0]
    if message is not None:
        raise PruningError(about + message)


def check_output(trainer: pl.Trainer, folder: Path) -> None:
    """Raise on every rank if rank zero cannot write to a folder.

    Raises:
        PruningError: With the folder and the reason.
    """
    check_on_rank_zero(trainer, lambda: check_writable(folder))


@contextlib.contextmanager
def warn_instead(
    what: str, errors: type[Exception] | tuple[type[Exception], ...] = (OSError, SafetensorError, PruningError)
) -> Iterator[None]:
    """Turn errors of some classes into a warning: the run is worth more than what was to be made of it.

    Args:
        what: What did not happen, as the warning begins.
        errors: The classes; by default those of writing files, a full disk say.
    """
    try:
        yield
    except errors as error:
        rank_zero_warn(one_line(f"{what}: {type(error).__name__}: {error}. The run goes on."))
