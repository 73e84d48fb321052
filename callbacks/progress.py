"""The progress bar of a pruning inside a fit: a line of Lightning's own rich display, or a bar of tqdm below Lightning's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from torch import nn
from tqdm.auto import tqdm

from lit_prune.architectures import find_group_sets
from lit_prune.config import PruningConfig
from lit_prune.phases import expected_work
from lit_prune.progress import Bar, Progress, Work


def progress_of(trainer: pl.Trainer, model: nn.Module, config: PruningConfig, *, dry_run: bool) -> Progress:
    """A bar over all phases of a pruning: on rank zero, and only if the trainer shows progress at all.

    Args:
        trainer: The trainer.
        model: The model.
        config: How it is pruned.
        dry_run: Whether nothing is cut.
    """

    def work(batches: int) -> list[Work]:
        group_sets = find_group_sets(model, blocks=config.limits.blocks, hidden=config.limits.hidden)
        return expected_work(model, group_sets, config, batches, dry_run=dry_run)

    return Progress(work, _bar_of(trainer))


def progress_over(trainer: pl.Trainer, description: str) -> Callable[[Sequence[Any]], Iterator[Any]]:
    """A function that shows how far an iteration over some items has come, likewise.

    Args:
        trainer: The trainer.
        description: What is done.
    """
    show = _bar_of(trainer)

    def shown(items: Sequence[Any]) -> Iterator[Any]:
        bar = None if show is None else show(len(items), description)
        try:
            for item in items:
                yield item
                if bar is not None:
                    bar.update(1)
        finally:
            if bar is not None:
                bar.close()

    return shown


def _bar_of(trainer: pl.Trainer) -> Callable[[int, str], Bar] | None:
    """What makes a bar of a total and a description; ``None`` where nothing is to be shown."""
    bar = trainer.progress_bar_callback
    if not trainer.is_global_zero or bar is None or not getattr(bar, "is_enabled", True):
        return None

    def show(total: int, description: str) -> Bar:
        if isinstance(bar, RichProgressBar) and bar.progress is not None:
            return _RichTask(bar.progress, total, description)
        return tqdm(total=total, desc=description, unit="pass", leave=False, dynamic_ncols=True)

    return show


class _RichTask:
    """A task of a rich display that is there already; two live displays would write over each other.

    Args:
        display: The display.
        total: Units of the whole task.
        description: What is done.
    """

    def __init__(self, display: Any, total: int, description: str) -> None:
        self._display = display
        self._task = display.add_task(description, total=total)

    def update(self, n: int) -> None:
        """Move on by a number of units."""
        self._display.update(self._task, advance=n)

    def set_description(self, desc: str) -> None:
        """Say what goes on."""
        self._display.update(self._task, description=desc)

    def close(self) -> None:
        """Hide the task. Lightning finds its own tasks by their position, so that none may be taken out."""
        self._display.update(self._task, visible=False)
