"""Validation around the cut: the trainer's own validation loop, run in the middle of a fit without a trace."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch

from lit_prune.callbacks.calibration import untouched
from lit_prune.callbacks.packages import is_overridden
from lit_prune.callbacks.ranks import ranks_of
from lit_prune.distributed.ranks import unguarded


def missing_validation(trainer: pl.Trainer) -> str | None:
    """Return why a fit has nothing to validate, or ``None`` if it validates."""
    if trainer.enable_validation:
        return None
    if not is_overridden("validation_step", trainer.lightning_module):
        return "the module has no validation_step"
    if trainer.limit_val_batches == 0:
        return "limit_val_batches is 0"
    return "there is no validation dataloader"


def validation_metrics(trainer: pl.Trainer) -> dict[str, float]:
    """Run the trainer's validation loop in the middle of a fit and return what it would have logged.

    Returns:
        The metrics by name; none if the fit has nothing to validate.
    """
    if missing_validation(trainer) is not None:
        return {}
    with unguarded(ranks_of(trainer)), untouched(trainer), _loop_state(trainer):
        trainer._logger_connector._callback_metrics = {}
        trainer.validating = True
        with torch.no_grad():
            trainer.fit_loop.epoch_loop.val_loop.run()
        metrics = trainer.callback_metrics
    return {name: float(value) for name, value in metrics.items() if value.numel() == 1}


@contextlib.contextmanager
def _loop_state(trainer: pl.Trainer) -> Iterator[None]:
    """Run the validation loop from its beginning, and leave loop and trainer as they were, also after an error.

    A resumed fit has the loop in the state of its checkpoint, from which it would go on in the middle. The dataloaders are
    forgotten, too, where the fit had none yet: it asks for them when it would have without this run.
    """
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    attributes: dict[str, Any] = dict(vars(loop))
    progress = copy.deepcopy(loop.batch_progress.state_dict())
    seen = copy.copy(loop._seen_batches_per_dataloader)
    stage, first = trainer.state.stage, connector._first_loop_iter
    validated = getattr(trainer, "_last_val_time", None)
    loop.restarting = False
    loop.batch_progress.reset()
    loop.reset_restart_stage()
    try:
        yield
    finally:
        trainer.state.stage = stage
        connector._first_loop_iter = first
        if validated is not None:
            trainer._last_val_time = validated  # type: ignore[attr-defined]
        vars(loop).update(attributes)
        loop.batch_progress.load_state_dict(progress)
        loop._seen_batches_per_dataloader = seen
