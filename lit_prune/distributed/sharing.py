"""Work on data that all processes have alike, shared out over them: each does a part, and all get the whole result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor

from lit_prune.distributed.ranks import Ranks

_RANKS: ContextVar[Ranks | None] = ContextVar("lit_prune_sharing_ranks", default=None)


@contextlib.contextmanager
def shared_work(ranks: Ranks | None) -> Iterator[None]:
    """Share out over processes what is computed within by :func:`own_part` and :class:`Turns`.

    All processes enter, and compute the same things in the same order from the same data.

    Args:
        ranks: The processes; each does all of the work if ``None``.
    """
    token = _RANKS.set(ranks)
    try:
        yield
    finally:
        _RANKS.reset(token)


def own_part(count: int) -> range:
    """Return which of some rows this process computes: all of them outside of :func:`shared_work`.

    Args:
        count: Number of rows.
    """
    ranks = _RANKS.get()
    if ranks is None:
        return range(count)
    step = -(-count // ranks.size)
    start = min(count, step * dist.get_rank())
    return range(start, min(count, start + step))


def from_all_parts(values: Tensor) -> Tensor:
    """Return values with the parts of all processes, the same on each of them.

    Args:
        values: Zero but for the part of this process; or one number of each, which are summed.
    """
    ranks = _RANKS.get()
    return values if ranks is None else ranks.sum(values)


class Turns:
    """Computations that the processes take in turns.

    Each is put off until every process has one of its own, so that they run at the same time.
    """

    def __init__(self) -> None:
        self._ranks = _RANKS.get()
        self._sizes: dict[Hashable, int] = {}
        self._own: dict[Hashable, Tensor] = {}
        self._waiting: list[tuple[Hashable, Callable[[], Tensor]]] = []

    def add(self, key: Hashable, size: int, compute: Callable[[], Tensor]) -> None:
        """Add a computation, which only the process whose turn it is keeps.

        Args:
            key: Its name.
            size: Number of values in its result.
            compute: Gives a float32 tensor of one dimension.
        """
        processes, rank = (1, 0) if self._ranks is None else (self._ranks.size, dist.get_rank())
        if len(self._sizes) % processes == rank:
            self._waiting.append((key, compute))
        self._sizes[key] = size
        if len(self._sizes) % processes == 0:
            self._run()

    def results(self) -> dict[Hashable, Tensor]:
        """Return the results of all computations by key, on the CPU; a collective."""
        self._run()
        empty = torch.zeros(0, dtype=torch.float32)
        own = [
            self._own[key].cpu() if key in self._own else torch.zeros(size, dtype=torch.float32)
            for key, size in self._sizes.items()
        ]
        together = torch.cat([empty, *own])
        if self._ranks is not None:
            together = self._ranks.sum(together)
        return dict(zip(self._sizes, together.split(list(self._sizes.values())), strict=True))

    def _run(self) -> None:
        for key, compute in self._waiting:
            self._own[key] = compute()
        self._waiting.clear()
