"""Errors of code that ran in calibration, and does not run once more for the repair."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from lit_prune.errors import PruningError, UnsupportedModelError
from lit_prune.repair.experts import StopForward

WAY_OUT = "Use repair='bias' or repair=None."


@contextlib.contextmanager
def rerun(failure: str) -> Iterator[None]:
    """Turn an error in what ran before into one that says so.

    Args:
        failure: What cannot be run again: the beginning of the message.

    Raises:
        UnsupportedModelError: In place of what was raised; memory that runs out, and our own errors, stay.
    """
    try:
        yield
    except (StopForward, PruningError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # the user's forward, called as it was not written to be called, may raise anything
        raise UnsupportedModelError(f"{failure} ({type(error).__name__}: {error}). {WAY_OUT}") from error
