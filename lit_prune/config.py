"""How to prune: the options of the engine, checked when they are given, and against a model before any work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
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
from lit_prune.budgets.budget import Budget
from lit_prune.budgets.goals import Goals
from lit_prune.budgets.resources import Resource
from lit_prune.budgets.workloads import Example
from lit_prune.calibration.statistics import GRADIENT_DTYPES, MODES
from lit_prune.calibration.terms import Term
from lit_prune.errors import ArgumentValueError
from lit_prune.groups import GroupSet
from lit_prune.ranking.budget_selection import check_budgets
from lit_prune.ranking.model_table import group_table, model_size, original_sizes, select_in_model
from lit_prune.ranking.registry import NORMALIZATIONS, criteria, get_criterion
from lit_prune.ranking.selection import RATIO_OF, Limits, parameter_budget
from lit_prune.repair.bias import added_biases
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


# what each quality stands for
QUALITIES: dict[str, dict[str, Any]] = {
    "fast": {"iterations": 1, "compensation": False, "polish_epochs": 0},
    "best": {"compensation": True, "polish_epochs": 3},
}


# the most that a cut removes, where their number is not given: perplexity of SmolLM2-135M after one cut over that after two is
# 1.00 at 20% and 1.016 at 30%
LARGEST_CUT = 0.2


# of a budget it is not known beforehand what share of the parameters it removes
CUTS_OF_BUDGET = 2


# what was removed before counts whole groups, a little more or less than was asked for
_ROUNDING = 0.01


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
    "iterations": optional(CUTS),
    "recalibrate_batch_norm": FLAG,
    "polish_epochs": NATURAL,
    "quality": optional(choice(*QUALITIES)),
    "offload_hidden_states": optional(FLAG),
    "rotate_hidden": FLAG,
    "reference": optional(pair("two numbers of parameters", NATURAL.hint)),
    "budget_share": Rule("a number above 0, up to 1", Annotated[float, Field(gt=0, le=1)]),
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
            reconstruct. What it needs is recorded in calibration where there is memory for it, as much as gradients would
            take; else it costs one more run of all decoder layers in each iteration.
        iterations: Number of equal cuts in which the ratio is reached. Each cut calibrates, ranks and repairs on the
            model that the previous one produced; see :func:`prune`. ``None`` for as few as remove 0.2 each at most, and two for a
            budget.
        recalibrate_batch_norm: Whether running means and variances of batch norms behind what is removed are estimated anew
            on the calibration batches after every cut: one more forward pass. Models without such layers stay as they are.
        polish_epochs: Number of passes over the calibration batches in which, after the last cut, the layers that a repair refits
            are trained towards the outputs of the dense model, see :mod:`lit_prune.repair.polish`; 0 trains nothing. A pass
            costs about as much as one of training.
        quality: ``"fast"``, in place of ``iterations``, ``compensation`` and ``polish_epochs``: one cut without compensation; or
            ``"best"``, in place of the last two: compensation, and three passes of polish. ``None`` for what those say. A value
            of one of them that is neither its default nor what the quality stands for is refused; one that equals its default
            cannot be told from one that was left out, and gives way to the quality.
        offload_hidden_states: Whether the repair holds the hidden states of all calibration tokens in CPU memory, and brings
            those of one batch at a time to a CUDA device. ``None`` does so once they would take more than an eighth of the
            device's memory.
        rotate_hidden: Whether hidden states are turned to their principal directions before each cut, so that directions are
            removed in place of channels (:func:`lit_prune.rotate_hidden`); only with ``"hidden"`` among the kinds, and for
            root-mean-square norms. One more forward pass. A tied head becomes a parameter of its own.
        reference: Numbers of all and of prunable parameters that the ratio refers to, if they are not those of the
            given model (later stages of a schedule). Parameters that are removed already count towards the ratio.
        budget: What the pruned model may take at most, in place of ``pruning_ratio``: a :class:`Budget`, a mapping of its
            fields, or text like ``"latency=1.5x,memory=6GB"``.
        budget_share: How far to go towards the budget: 0.5 is half of what has to be saved. Set by :meth:`steps`.
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
    iterations: int | None = None
    recalibrate_batch_norm: bool = True
    polish_epochs: int = 0
    quality: Literal["fast", "best"] | None = None
    offload_hidden_states: bool | None = None
    rotate_hidden: bool = False
    reference: tuple[int, int] | None = None
    budget: Budget | str | None = None
    budget_share: float = 1.0

    def __post_init__(self) -> None:
        """Check everything that can be checked without a model.

        Raises:
            ArgumentTypeError: If a value is of another type.
            ArgumentValueError: If a value is unknown or out of its range.
        """
        check_fields(self, _RULES)
        self._set_quality()
        if self.budget is not None:
            object.__setattr__(self, "budget", Budget.of(self.budget))
            if self.pruning_ratio != PruningConfig.pruning_ratio or self.ratio_of != "all":
                raise ArgumentValueError(
                    f"Give pruning_ratio or budget; found pruning_ratio={self.pruning_ratio},"
                    f" ratio_of={self.ratio_of!r} and {self.budget}."
                )
        if self.limits.hidden and self.repair == "bias":
            raise ArgumentValueError(
                "repair='bias' would give every layer that reads hidden states a bias where kinds has 'hidden'; expected"
                " 'least_squares' or None."
            )
        if self.limits.hidden and (self.budget is not None or self.polish_epochs):
            raise ArgumentValueError(
                "Hidden channels are removed by a pruning_ratio, and change what a model's head reads; expected neither budget"
                f" nor polish_epochs (which quality='best' sets) where kinds has 'hidden'; found"
                f" budget={self.budget}, polish_epochs={self.polish_epochs} and quality={self.quality!r}."
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

    def _set_quality(self) -> None:
        """Put what the quality stands for into the fields that it is given in place of."""
        if self.quality is None:
            return
        meant = QUALITIES[self.quality]
        for name, value in meant.items():
            if getattr(self, name) not in (value, getattr(PruningConfig, name)):
                raise ArgumentValueError(
                    f"quality={self.quality!r} stands for {meant}; expected it or {name}, found both and"
                    f" {name}={getattr(self, name)!r}."
                )
            object.__setattr__(self, name, value)

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
        """Whether a calibration batch is kept out of statistics and repair, for what is judged on data that it has not seen.

        That is the choice between candidates, and when to stop polishing.
        """
        return (self.importance == AUTO or self.polish_epochs > 0) and batch % HELD_BACK == HELD_BACK - 1

    def not_held_back(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches without those that are held back."""
        return (batch for number, batch in enumerate(batches) if not self.holds_back(number))

    @property
    def repairs_on_all(self) -> bool:
        """Whether the repair may use the batches that are held back, too: once the candidates are compared, they are free."""
        return self.polish_epochs == 0

    def goals(self, model: nn.Module, group_sets: Sequence[GroupSet], example: Example | None = None) -> Goals | None:
        """What the budget is of this model, measured where it has to be; ``None`` if there is none.

        Args:
            model: The model, before any cut; it is run for budgets of FLOPs, caches and times.
            group_sets: Its group sets.
            example: Runs a calibration batch where the model takes no token ids, see
                :class:`lit_prune.budgets.workloads.Workload`.

        Raises:
            BudgetError: If the budget asks for something that the model does not have.
        """
        if self.budget is None:
            return None
        added = added_biases(model, group_sets) if self.repair == "bias" else {}
        return Goals(model, group_sets, Budget.of(self.budget), example, added)

    def check(self, model: nn.Module, group_sets: Sequence[GroupSet], goals: Goals | None = None) -> None:
        """Check against a model that the ratio or the budget can be reached, before any calibration.

        Args:
            model: The model.
            group_sets: Its group sets.
            goals: What :meth:`goals` found of the model that the budget is of; of this one if ``None``.

        Raises:
            BudgetError: If it cannot.
            ValueError: If the limits name something the model does not have.
        """
        table = group_table(model, group_sets, [torch.zeros(s.size, dtype=torch.float32) for s in group_sets])
        goals = goals or self.goals(model, group_sets)
        if goals is not None:
            resources, multiple = self.resources(model, group_sets, goals)
            check_budgets(table, resources, self.limits, original_sizes(model), multiple)
            return
        select_in_model(model, group_sets, table, self.budget_of_parameters(model, group_sets), self.limits)

    def resources(
        self, model: nn.Module, group_sets: Sequence[GroupSet], goals: Goals
    ) -> tuple[list[Resource], np.ndarray | None]:
        """The limits for what is left of a model, and the steps of its measured times, unless ``limits`` say something else."""
        multiple = goals.multiples(model, group_sets) if self.limits.multiple_of is None else None
        return goals.resources(model, group_sets, self.budget_share), multiple

    def steps(self, model: nn.Module, group_sets: Sequence[GroupSet]) -> list[PruningConfig]:
        """One configuration for every iteration, with ratios that rise evenly from what is gone already."""
        if self.budget is not None:
            cuts = self.iterations or CUTS_OF_BUDGET
            shares = [(k + 1) / cuts * self.budget_share for k in range(cuts)]
            return [replace(self, budget_share=share, iterations=1, quality=None) for share in shares]
        size = model_size(model, group_sets)
        reference = self.reference or size
        gone = (reference[0] - size[0]) / reference[0 if self.ratio_of == "all" else 1]
        left = self.pruning_ratio - gone
        cuts = self.iterations or max(1, math.ceil(left / LARGEST_CUT - _ROUNDING))
        ratios = [gone + left * (k + 1) / cuts for k in range(cuts - 1)]
        return [
            replace(self, pruning_ratio=r, reference=reference, iterations=1, quality=None)
            for r in (*ratios, self.pruning_ratio)
        ]

    def budget_of_parameters(self, model: nn.Module, group_sets: Sequence[GroupSet]) -> int:
        """Parameters to remove from the model.

        The ratio is of the model as it is, or, with ``reference``, of what it was, less what is gone already.
        """
        total, prunable = model_size(model, group_sets)
        reference = self.reference or (total, prunable)
        return parameter_budget(self.pruning_ratio, self.ratio_of, *reference) - (reference[0] - total)
