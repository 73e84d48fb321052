"""When to prune, and how far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from lit_prune.arguments import MOST_CUTS, NATURAL, RATIO, check_fields, choice, count, instance, optional, sequence_of
from lit_prune.errors import ArgumentValueError


@dataclass(frozen=True)
class Stage:
    """One point of a schedule.

    Args:
        ratio: Fraction of the parameters of the model before any pruning that is gone after this stage.
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
    r"""Gradual pruning, fast at first and slow at the end: :math:`s_k = s\,(1 - (1 - k/n)^3)` after stage k of n.

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
