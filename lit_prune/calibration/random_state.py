"""The states of the global random number generators of Python, NumPy and torch."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")


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


def same_random_numbers(give: Callable[[str], T]) -> Callable[[str], contextlib.AbstractContextManager[T]]:
    """Return a function that gives what another one does, in a context that starts with the random numbers of right now.

    The states of the global random number generators are put back when such a context ends.
    """
    rewind = random_state()

    @contextlib.contextmanager
    def given(what: str) -> Iterator[T]:
        with random_state_kept():
            rewind()
            yield give(what)

    return given
