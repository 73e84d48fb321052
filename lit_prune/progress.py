"""One progress bar over everything that a pruning does, with the time left."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


class Bar(Protocol):
    """What is shown: tqdm's bar, or one that behaves like it."""

    def update(self, n: int, /) -> Any:
        """Move on by a number of units."""

    def set_description(self, desc: str, /) -> Any:
        """Say what goes on."""

    def close(self) -> Any:
        """Take the bar away."""


@dataclass(frozen=True)
class Work:
    """What a phase is expected to take, in forward passes of one batch.

    Args:
        phase: Name of the phase.
        batches: What it takes while batches are read.
        count: Number of batches that are read, over which this is spread evenly.
        walk: What it takes while it goes from layer to layer, spread evenly over them.
    """

    phase: str
    batches: float = 0
    count: int = 0
    walk: float = 0


def terminal_bar(total: int, description: str) -> Bar:
    """Tqdm's bar on the standard error, if that is a terminal; nothing otherwise."""
    return tqdm(
        total=total, desc=description, unit="pass", leave=False, dynamic_ncols=True, file=sys.stderr, disable=None
    )


class Progress:
    """A bar that phases move: by the batches that they read and the layers that they go through, and to their end.

    However much of its work a phase did not need, the bar stands where it was expected to be at the phase's end.

    Args:
        work: Gives what is to be done in order, for a number of batches.
        show: Makes the bar of a total and a description; ``None`` shows nothing.
        title: What the description begins with.
    """

    def __init__(
        self,
        work: Callable[[int], Sequence[Work]],
        show: Callable[[int, str], Bar] | None = terminal_bar,
        title: str = "Pruning",
    ) -> None:
        self._make_work, self._show, self._title = work, show, title
        self._work: list[Work] | None = None
        self._ends: list[float] = []
        self._bar: Bar | None = None
        self._phase: str | None = None
        self._at = -1
        self._begun = False
        self._position = 0.0
        self._shown = 0

    def known(self, batches: int) -> None:
        """Say how many batches there are, which the total follows from; the first call counts."""
        if self._work is not None:
            return
        self._work = list(self._make_work(batches))
        self._ends = list(itertools.accumulate(w.batches + w.walk for w in self._work))
        if self._show is not None and self._ends:
            self._bar = self._show(round(self._ends[-1]), self._title)
        if self._phase is not None:
            self._begin(self._phase)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show that a phase goes on, and at its end that it is done."""
        self._phase = name
        self._begin(name)
        try:
            yield
            if self._begun:
                self._move(self._ends[self._at])
        finally:
            self._phase, self._begun = None, False

    def _begin(self, name: str) -> None:
        """Go to the next expected phase of that name; those before it are skipped."""
        works = self._work or []
        found = next((i for i in range(self._at + 1, len(works)) if works[i].phase == name), None)
        self._begun = found is not None
        if found is None:
            return
        self._at = found
        again = [i for i, work in enumerate(works) if work.phase == name]
        number = f" {again.index(found) + 1}/{len(again)}" if len(again) > 1 else ""
        if self._bar is not None:
            self._bar.set_description(f"{self._title}: {name}{number}")
        self._move(self._start)

    @property
    def _start(self) -> float:
        work = (self._work or [])[self._at]
        return self._ends[self._at] - work.batches - work.walk

    def batches(self, items: Iterable[T]) -> Iterator[T]:
        """The batches; the bar moves after each."""
        for item in items:
            yield item
            self.batch_done()

    def batch_done(self) -> None:
        """Move the bar by a batch, but not beyond what the phase's batches are expected to take."""
        if self._begun and self._work:
            work = self._work[self._at]
            most = self._start + work.batches
            if self._position < most:
                self._move(min(most, self._position + work.batches / max(1, work.count)))

    def layers(self, names: Sequence[T]) -> Iterator[T]:
        """The layers that a phase goes through; the bar moves after each."""
        for number, name in enumerate(names, start=1):
            yield name
            if self._begun and self._work:
                work = self._work[self._at]
                self._move(self._start + work.batches + work.walk * number / len(names))

    def _move(self, position: float) -> None:
        self._position = max(self._position, position)
        if self._bar is not None and int(self._position + 1e-6) > self._shown:
            self._bar.update(int(self._position + 1e-6) - self._shown)
            self._shown = int(self._position + 1e-6)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None and self._ends:
            self._move(self._ends[-1])
        self.close()
