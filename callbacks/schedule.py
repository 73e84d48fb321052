"""When to prune, and how far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lit_prune.arguments import MOST_CUTS, NATURAL, RATIO, check_fields, choice, count, instance, optional, sequence_of
from lit_prune.callbacks.packages import is_overridden
from lit_prune.errors import ArgumentValueError


@dataclass(frozen=True)
class Stage:
    """One point of a schedule.

    Args:
        ratio: Fraction of the dense model's parameters that is removed after this stage.
        epoch: Prune at the start of this epoch (0 is the first).
        step: Prune before the first batch after this many optimizer steps, in place of ``epoch``.

    Raises:
        ArgumentTypeError: If a value is of another type.
        ArgumentValueError: If not exactly one of ``epoch`` and ``step`` is given, it is negative, or the ratio is out of
            range.
    """

    ratio: float
    epoch: int | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check_fields(self, {"ratio": RATIO, "epoch": optional(NATURAL), "step": optional(NATURAL)})
        if (self.epoch is None) == (self.step is None):
            raise ArgumentValueError(
                f"Give epoch or step, one and not both; found epoch={self.epoch} and step={self.step}."
            )

    def __str__(self) -> str:
        """When the stage is due, in words."""
        return f"epoch {self.epoch}" if self.step is None else f"step {self.step}"


@dataclass(frozen=True)
class CubicSchedule:
    r"""Gradual pruning with a cubic ramp, fast at first and slow at the end: :math:`s_k = s\,(1 - (1 - k/n)^3)` after
    stage k of n.

    Args:
        start: Epoch or step of the first stage.
        end: Epoch or step of the last stage, at which the whole ratio is reached.
        stages: Number of stages, at least 2, spread evenly.
        unit: Whether ``start`` and ``end`` count epochs or steps.

    Raises:
        ArgumentTypeError: If a value is of another type.
        ArgumentValueError: If a number is out of its range, or the numbers do not fit each other.

    Reference: Zhu and Gupta, To prune, or not to prune, 2017.
    """

    start: int
    end: int
    stages: int
    unit: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        """Check the values."""
        check_fields(
            self,
            {"start": NATURAL, "end": NATURAL, "stages": count(2, MOST_CUTS), "unit": choice("epoch", "step")},
        )
        if self.end - self.start < self.stages - 1:
            raise ArgumentValueError(
                f"A cubic schedule needs at least 2 stages and a different {self.unit} for each of them; found start="
                f"{self.start}, end={self.end}, stages={self.stages}."
            )

    def resolve(self, ratio: float) -> tuple[Stage, ...]:
        """The stages that lead to a ratio."""
        points = [self.start + round(k * (self.end - self.start) / (self.stages - 1)) for k in range(self.stages)]
        reached = [ratio * (1 - (1 - k / self.stages) ** 3) for k in range(1, self.stages + 1)]
        return tuple(Stage(r, **{self.unit: p}) for r, p in zip(reached, points, strict=True))


def check_stages(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Refuse stages that do not follow each other.

    Raises:
        ArgumentTypeError: If they are not a list of stages.
        ArgumentValueError: If there is none, ratios do not rise, units are mixed, or points do not rise.
    """
    rule = sequence_of("a CubicSchedule, or a list of at least one Stage", instance("a Stage", Stage), empty=False)
    stages = rule.check("schedule", stages)
    points = [s.step if s.epoch is None else s.epoch for s in stages]
    ratios = [s.ratio for s in stages]
    mixed = len({s.epoch is None for s in stages}) > 1
    if mixed or any(a >= b for values in (points, ratios) for a, b in pairwise(values)):
        raise ArgumentValueError(
            f"The stages of a schedule must rise in point and ratio, all by epoch or all by step; found {list(stages)}."
        )
    return stages


def check_timing(schedule: object, epoch: int | None, step: int | None, budget: object) -> None:
    """Refuse a schedule beside an epoch, a step or a budget, which is reached at one point.

    Raises:
        ArgumentValueError: If there is one.
    """
    if schedule is not None and (epoch is not None or step is not None):
        raise ArgumentValueError(f"Give a schedule, or epoch or step; found {schedule}, epoch={epoch} and step={step}.")
    if schedule is not None and budget is not None:
        raise ArgumentValueError(f"A budget is reached at one epoch or step; found {schedule} and the budget {budget}.")


def due_stage(stages: Sequence[Stage], done: int, *, epoch: int | None = None, step: int | None = None) -> int | None:
    """Return the index of the last stage that is due and not done, or ``None``.

    Args:
        stages: The schedule.
        done: How many of its stages are done.
        epoch: The epoch now; stages by epoch are left out if ``None``.
        step: Optimizer steps so far; stages by step are left out if ``None``.
    """
    due = [
        index
        for index, stage in enumerate(stages)
        if (epoch is not None and stage.epoch is not None and stage.epoch <= epoch)
        or (step is not None and stage.step is not None and stage.step <= step)
    ]
    return due[-1] if due and due[-1] >= done else None


def skips_epoch_start(trainer: pl.Trainer) -> bool:
    """Whether a resumed fit, about to train, continues an epoch without calling ``on_train_epoch_start`` for it.

    Lightning does so for a checkpoint from the middle of an epoch, and for one from its last batch: then for the epoch after.
    """
    return bool(trainer.fit_loop.restarted_mid_epoch or trainer.fit_loop.restarted_on_epoch_end)


def begin_epoch_anew(trainer: pl.Trainer) -> None:
    """Let a fit that is resumed from a checkpoint of an epoch's start, where stages are cut, run that epoch.

    Lightning counts the batches of the epoch before as batches of this one, and so runs none.
    """
    loop = trainer.fit_loop
    if loop.restarted_on_epoch_start:
        loop.epoch_loop.restarting = False
        loop.epoch_progress.current.ready = loop.epoch_progress.current.started + 1  # type: ignore[attr-defined]


def check_reachable(trainer: pl.Trainer, pl_module: pl.LightningModule, stages: Sequence[Stage]) -> None:
    """Refuse stages that the fit ends before, as far as its length is known.

    Nothing is refused because of what may end a fit early (a time limit, early stopping), where the number of batches or of
    optimizer steps a batch is not known, or under ``fast_dev_run``.

    Args:
        trainer: The trainer, about to train, with its dataloaders set up.
        pl_module: The module.
        stages: The stages still to come.

    Raises:
        ValueError: Naming the first stage that cannot come.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    epochs, steps = (math.inf if n in (None, -1) else n for n in (trainer.max_epochs, trainer.max_steps))
    fewest, most = _steps_per_epoch(trainer, pl_module)
    reached = min(steps, trainer.global_step + (epochs - trainer.current_epoch) * most)
    whole = trainer.current_epoch + (trainer.fit_loop.epoch_loop.batch_progress.current.ready > 0)
    for stage in stages:
        if stage.step is not None:
            possible = stage.step <= trainer.global_step or stage.step < reached
        else:
            assert stage.epoch is not None
            before = trainer.global_step + max(0, stage.epoch - whole) * fewest
            possible = stage.epoch <= trainer.current_epoch or (stage.epoch < epochs and before < steps)
        if not possible:
            limits = f"max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}"
            batches = f", {trainer.num_training_batches} batches an epoch" if math.isfinite(most) else ""
            raise ValueError(
                f"StructuredPruning is to prune at {stage} (both count from 0), but this fit ends before it: {limits}{batches}."
                " Choose an earlier epoch or step, or train longer."
            )


def _steps_per_epoch(trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[int, float]:
    """The fewest and the most optimizer steps that an epoch may have."""
    batches = trainer.num_training_batches
    varies = not pl_module.automatic_optimization or trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
    if varies or not math.isfinite(batches):
        return 0, math.inf
    factors = [trainer.accumulate_grad_batches]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            factors += callback.scheduling.values()
    skips = is_overridden("on_train_batch_start", pl_module)
    return 0 if skips else math.ceil(batches / max(factors)), math.ceil(batches / min(factors))


def stages_of(
    schedule: Sequence[Stage] | CubicSchedule | None, ratio: float, epoch: int | None, step: int | None
) -> tuple[Stage, ...]:
    """The stages of a schedule; without one, a single stage, by default at the start of epoch 1.

    Args:
        schedule: The schedule, checked by :func:`check_timing`.
        ratio: Fraction of the parameters that is removed after the last stage.
        epoch: When the single stage is due.
        step: When it is due, in optimizer steps.
    """
    if isinstance(schedule, CubicSchedule):
        return schedule.resolve(ratio)
    if schedule is not None:
        return check_stages(schedule)
    return (Stage(ratio, 1 if epoch is None and step is None else epoch, step),)
