"""How to prune: the options of the engine, checked when they are given, and against a model before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from lit_prune.arguments import (
    CUTS,
    FLAG,
    INTEGER,
    NATURAL,
    RATIO,
    TEXT,
    Rule,
    check_fields,
    choice,
    either,
    instance,
    mapping_of,
    optional,
    pair,
    shown,
)
from lit_prune.calibration.statistics import GRADIENT_DTYPES, MODES
from lit_prune.calibration.terms import Term
from lit_prune.errors import ArgumentValueError
from lit_prune.groups import GroupSet
from lit_prune.ranking.model_table import group_table, model_size, select_in_model
from lit_prune.ranking.registry import NORMALIZATIONS, criteria, get_criterion
from lit_prune.ranking.selection import RATIO_OF, Limits, parameter_budget
from lit_prune.repair.refit import REPAIRS

DEFAULT = "default"


AUTO = "auto"


# what importance="auto" chooses from; plain taylor is among them, so that it cannot lose to it but by noise
CANDIDATES: dict[str, dict[str, float]] = {
    "taylor": {"taylor": 1.0},
    "second_order": {"second_order": 1.0},
    "fisher": {"fisher": 1.0},
    "taylor_batch + output_wanda": {"taylor_batch": 0.75, "output_wanda": 0.25},
}


HELD_BACK = 8


# smaller or larger ones would vanish in float32, or be infinite
_WEIGHT: Rule[float] = Rule("a number from 1e-6 to 1e6", Annotated[float, Field(ge=1e-6, le=1e6)])


_RULES: dict[str, Rule] = {
    "importance": either(
        "the name of a criterion, or a mapping of names to positive weights (from 1e-6 to 1e6)",
        TEXT,
        mapping_of("weights by name", TEXT, _WEIGHT, empty=False),
    ),
    "pruning_ratio": RATIO,
    "ratio_of": choice(*RATIO_OF),
    "normalize": optional(choice(DEFAULT, *NORMALIZATIONS)),
    "statistics": choice(*MODES),
    "gradient_dtype": choice(*GRADIENT_DTYPES),
    "offload_gradients": FLAG,
    "limits": instance("a lit_prune.Limits", Limits),
    "repair": optional(choice(*REPAIRS)),
    "seed": INTEGER,
    "compensation": FLAG,
    "iterations": CUTS,
    "recalibrate_batch_norm": FLAG,
    "rotate_hidden": FLAG,
    "reference": optional(pair("two numbers of parameters", NATURAL.hint)),
}


@dataclass(frozen=True)
class PruningConfig:
    """Options of a pruning: criterion, ratio, limits and repair.

    Args:
        importance: Name of a criterion; a mix of several, ``{name: weight}``, each scaled to sum to 1 over the model; or
            ``"auto"``, which ranks by each of :data:`CANDIDATES` from one calibration, holds back every eighth
            calibration batch, and takes the plan whose masked model has the lowest loss on the held-back batches.
        pruning_ratio: Fraction of parameters to remove, strictly between 0 and 1.
        ratio_of: Whether the ratio refers to ``"all"`` parameters of the model or to the ``"prunable"`` ones.
        normalize: Normalisation of the importance; ``"default"`` is the criterion's own, ``None`` is none.
        statistics: How gradients are kept, ``"streaming"`` or ``"elementwise"``.
        gradient_dtype: What gradients are accumulated in where a criterion needs them element by element (``taylor``):
            ``"float32"`` or ``"bfloat16"``.
        offload_gradients: Accumulate those in CPU memory in place of the model's device.
        limits: Floors, protections and rounding.
        repair: How the layers that read the removed groups are corrected: ``"least_squares"``, ``"bias"`` or ``None``;
            see
            :mod:`lit_prune.repair.refit`.
        seed: Seed of the criterion ``random``.
        compensation: Whether importance takes the repair ``"least_squares"`` into account: it is multiplied by the
            square root of the fraction of the group's output that a linear regression on the other groups cannot
            reconstruct. Costs two more forward passes over the calibration batches in each iteration.
        iterations: Number of equal cuts in which the ratio is reached. Each cut calibrates, ranks and repairs on the
            model that the previous one produced; see :func:`prune`.
        recalibrate_batch_norm: Whether running means and variances of batch norms behind what is removed are estimated anew
            on the calibration batches after every cut: one more forward pass. Models without such layers stay as they are.
        rotate_hidden: Whether hidden states are turned to their principal directions before each cut, so that directions are
            removed in place of channels (:func:`lit_prune.rotate_hidden`); only with ``"hidden"`` among the kinds, and for
            root-mean-square norms. One more forward pass. A tied head becomes a parameter of its own.
        reference: Numbers of all and of prunable parameters that the ratio refers to, if they are not those of the
            given model (later stages of a schedule). Parameters that are removed already count towards the ratio.
    """

    importance: str | Mapping[str, float] = "fisher"
    pruning_ratio: float = 0.2
    ratio_of: Literal["all", "prunable"] = "all"
    normalize: str | None = DEFAULT
    statistics: Literal["streaming", "elementwise"] = "streaming"
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    offload_gradients: bool = False
    limits: Limits = field(default_factory=Limits)
    repair: Literal["least_squares", "bias"] | None = "least_squares"
    seed: int = 0
    compensation: bool = True
    iterations: int = 2
    recalibrate_batch_norm: bool = True
    rotate_hidden: bool = False
    reference: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check everything that can be checked without a model.

        Raises:
            ArgumentTypeError: If a value is of another type.
            ArgumentValueError: If a value is unknown or out of its range.
        """
        check_fields(self, _RULES)
        if self.limits.hidden and self.repair == "bias":
            raise ArgumentValueError(
                "repair='bias' would give every layer that reads hidden states a bias where kinds has 'hidden'; expected"
                " 'least_squares' or None."
            )
        if self.rotate_hidden and not self.limits.hidden:
            raise ArgumentValueError(
                f"rotate_hidden=True turns hidden states so that directions can be removed; expected 'hidden' among the kinds,"
                f" found kinds={self.limits.kinds!r}."
            )
        for weights in self.candidates.values():
            for name in weights:
                if name not in criteria():
                    raise ArgumentValueError(
                        f"importance must name criteria out of {', '.join(criteria())}, or be {AUTO!r}; found"
                        f" {shown(name)}."
                    )

    @property
    def candidates(self) -> dict[str, Mapping[str, float]]:
        """The mixes of criteria to choose from, by what they are called; one, unless ``importance`` is ``"auto"``."""
        if self.importance == AUTO:
            return dict(CANDIDATES)
        if isinstance(self.importance, str):
            return {self.importance: {self.importance: 1.0}}
        return {" + ".join(self.importance): self.importance}

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms that calibration has to collect for."""
        return tuple(
            term for weights in self.candidates.values() for name in weights for term in get_criterion(name).terms
        )

    @property
    def compensates(self) -> bool:
        """Whether importance is to be discounted; that of the baselines, which look at no data, never is."""
        looks = any(term.statistic is not None for term in self.terms)
        return self.compensation and self.repair == "least_squares" and looks

    def holds_back(self, batch: int) -> bool:
        """Whether a calibration batch is kept out of the statistics, to choose between candidates by."""
        return self.importance == AUTO and batch % HELD_BACK == HELD_BACK - 1

    def check(self, model: nn.Module, group_sets: Sequence[GroupSet]) -> None:
        """Check against a model that the ratio can be reached, before any calibration.

        Raises:
            BudgetError: If it cannot.
            ValueError: If the limits name something the model does not have.
        """
        table = group_table(model, group_sets, [torch.zeros(s.size, dtype=torch.float32) for s in group_sets])
        select_in_model(model, group_sets, table, self.budget(model, group_sets), self.limits)

    def steps(self, model: nn.Module, group_sets: Sequence[GroupSet]) -> list[PruningConfig]:
        """One configuration for every iteration, with ratios that rise evenly from what is gone already."""
        size = model_size(model, group_sets)
        reference = self.reference or size
        gone = (reference[0] - size[0]) / reference[0 if self.ratio_of == "all" else 1]
        shares = [(k + 1) / self.iterations for k in range(self.iterations - 1)]
        ratios = [gone + (self.pruning_ratio - gone) * share for share in shares]
        return [
            replace(self, pruning_ratio=r, reference=reference, iterations=1) for r in (*ratios, self.pruning_ratio)
        ]

    def budget(self, model: nn.Module, group_sets: Sequence[GroupSet]) -> int:
        """Parameters to remove from the model.

        The ratio is of the model as it is, or, with ``reference``, of what it was, less what is gone already.
        """
        total, prunable = model_size(model, group_sets)
        reference = self.reference or (total, prunable)
        return parameter_budget(self.pruning_ratio, self.ratio_of, *reference) - (reference[0] - total)
