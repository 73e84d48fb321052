"""New optimizers in the middle of a fit, for callbacks that change what is trained."""

from __future__ import annotations

import lightning.pytorch as pl

from lit_prune.callbacks.pruning import StructuredPruning
from lit_prune.errors import PruningError


def _pruning_callbacks(trainer: pl.Trainer) -> list[StructuredPruning]:
    return [c for c in trainer.callbacks if isinstance(c, StructuredPruning)]  # type: ignore[attr-defined]


def _any_cut(trainer: pl.Trainer) -> bool:
    """Whether the run of this model has had its first cut."""
    return any(callback.stages_done and not callback.dry_run for callback in _pruning_callbacks(trainer))


def _renew_optimizers(trainer: pl.Trainer) -> None:
    """Let the module configure its optimizers anew; learning rates and schedulers go on where they were.

    Raises:
        PruningError: If there are other numbers of optimizers, parameter groups or schedulers than before, so that they
            cannot be told which is which; the optimizers are those from before then.
    """
    strategy = trainer.strategy
    before = strategy.optimizers, strategy.lr_scheduler_configs
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in strategy.optimizers]
    schedulers = [config.scheduler.state_dict() for config in strategy.lr_scheduler_configs]
    strategy.setup_optimizers(trainer)
    groups = [len(optimizer.param_groups) for optimizer in strategy.optimizers]
    if groups != [len(of_one) for of_one in rates] or len(strategy.lr_scheduler_configs) != len(schedulers):
        found = f"parameter groups {groups} by optimizer and {len(strategy.lr_scheduler_configs)} schedulers"
        strategy.optimizers, strategy.lr_scheduler_configs = before
        raise PruningError(
            f"configure_optimizers of {type(trainer.lightning_module).__name__} gave {found} for what is trained from now on;"
            f" expected {[len(of_one) for of_one in rates]} and {len(schedulers)}, as before, so that learning rates and"
            " schedulers can go on. Let it give every group, also those that are empty because their parameters are"
            " frozen."
        )
    for optimizer, of_one in zip(strategy.optimizers, rates, strict=True):
        for group, rate in zip(optimizer.param_groups, of_one, strict=True):
            group["lr"] = rate
    for config, state in zip(strategy.lr_scheduler_configs, schedulers, strict=True):
        config.scheduler.load_state_dict(state)
