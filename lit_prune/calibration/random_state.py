"""The states of the global random number generators of Python, NumPy and torch."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch


def random_state() -> Callable[[], None]:
    """Note the states of the global random number generators.

    Returns:
        A function that puts them back, as often as it is called.
    """
    python, array, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return restore


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the states of the global random number generators of Python, NumPy and torch back, also after an error."""
    restore = random_state()
    try:
        yield
    finally:
        restore()
