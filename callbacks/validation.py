"""Validation around the cut: the trainer's own validation loop, run in the middle of a fit without a trace."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

from lit_prune.callbacks.calibration import untouched
from lit_prune.callbacks.lightning_internals import forget_metrics, validation_from_the_start
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
    with unguarded(ranks_of(trainer)), untouched(trainer), validation_from_the_start(trainer) as loop:
        forget_metrics(trainer)
        trainer.validating = True
        with torch.no_grad():
            loop.run()
        metrics = trainer.callback_metrics
    return {name: float(value) for name, value in metrics.items() if value.numel() == 1}
