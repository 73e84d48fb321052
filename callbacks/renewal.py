"""New optimizers in the middle of a fit, for callbacks that change what is trained."""

from __future__ import annotations

import lightning.pytorch as pl

from lit_prune.callbacks.pruning import StructuredPruning


def _pruning_callbacks(trainer: pl.Trainer) -> list[StructuredPruning]:
    return [c for c in trainer.callbacks if isinstance(c, StructuredPruning)]  # type: ignore[attr-defined]


def _any_cut(trainer: pl.Trainer) -> bool:
    """Whether the run of this model has had its first cut."""
    return any(callback.stages_done and not callback.dry_run for callback in _pruning_callbacks(trainer))


def _renew_optimizers(trainer: pl.Trainer) -> None:
    """Let the module configure its optimizers anew; learning rates and schedulers go on where they were."""
    strategy = trainer.strategy
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in strategy.optimizers]
    schedulers = [config.scheduler.state_dict() for config in strategy.lr_scheduler_configs]
    strategy.setup_optimizers(trainer)
    for optimizer, before in zip(strategy.optimizers, rates, strict=True):
        for group, rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate
    for config, state in zip(strategy.lr_scheduler_configs, schedulers, strict=True):
        config.scheduler.load_state_dict(state)
