"""What observes a model while it is calibrated, chosen by the statistics that the terms name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lit_prune.calibration.accumulator import _Accumulator
from lit_prune.calibration.activations import ActivationObserver, observed_modules
from lit_prune.calibration.mask_gradients import MaskCollector, observable
from lit_prune.calibration.statistic_registry import (
    GradientStatistic,
    GroupObserver,
    GroupStatistic,
    InputStatistic,
    MaskStatistic,
    get_statistic,
)
from lit_prune.calibration.statistics import Statistics
from lit_prune.calibration.terms import Term
from lit_prune.calibration.token_masks import TokenMasks
from lit_prune.calibration.weight_gradients import _everywhere, _GradientCollector
from lit_prune.distributed.ranks import Ranks
from lit_prune.errors import CalibrationError
from lit_prune.groups import GroupSet

# what repairs read of the inputs
REPAIR_SUMS = ("sum", "sum_abs", "sum_squares")


def split_mask_terms(terms: Sequence[Term], group_sets: Sequence[GroupSet]) -> tuple[list[Term], list[Term]]:
    """Choose how derivatives by masks of groups are computed, which ``fisher`` is made of; the one place that does.

    By masks on what the consumers read (:mod:`lit_prune.calibration.mask_gradients`) where the inputs of all consumers can
    be seen: that needs no gradient of a weight, and gives one derivative a sample. Else from the gradients of the weights
    (:mod:`lit_prune.calibration.weight_gradients`): the sum of weight times gradient over a group's producers is the same
    derivative, but of a batch as a whole, so that a batch is one sample. All group sets are computed in the same way, as
    squares over samples and squares over batches do not compare.

    Args:
        terms: All terms.
        group_sets: The group sets.

    Returns:
        The terms to compute by masks, and those to compute from weights, in their order.
    """
    masked = [t for t in terms if _is(t, MaskStatistic)] if observable(group_sets) else []
    return masked, [t for t in terms if t not in masked and _is(t, MaskStatistic, GradientStatistic)]


def _is(term: Term, *kinds: type) -> bool:
    return term.statistic is not None and isinstance(get_statistic(term.statistic), kinds)


class PassRecorder(Protocol):
    """Records a calibration pass for what comes after it."""

    def observed(self, token_masks: TokenMasks) -> contextlib.AbstractContextManager[None]:
        """Record what happens within; the masks tell which positions are real."""

    def take_batch(self) -> None:
        """Take note of a batch that counts, between its forward and its backward pass."""

    def skip_batch(self) -> None:
        """Drop what the forward pass of a batch left that does not count."""


class Observers:
    """Everything that observes a model for some terms; a context manager, with one method for each moment of a batch.

    Args:
        model: The model.
        root: The module that computes the loss.
        group_sets: The group sets.
        terms: The terms.
        mode: ``"streaming"`` or ``"elementwise"``.
        activations: Whether to keep all sums of inputs that a repair may read.
        accumulator: Takes the gradients that are kept element by element.
        ranks: The processes of a distributed run.
        recorder: Records the pass as well.

    Attributes:
        gradients: Whether a backward pass is needed for every batch.
    """

    def __init__(
        self,
        model: nn.Module,
        root: nn.Module,
        group_sets: Sequence[GroupSet],
        terms: Iterable[Term],
        *,
        mode: str,
        activations: bool,
        accumulator: _Accumulator,
        ranks: Ranks | None,
        recorder: PassRecorder | None = None,
    ) -> None:
        terms = list(dict.fromkeys(terms))
        named = dict.fromkeys(get_statistic(t.statistic) for t in terms if t.statistic is not None)
        own = [s for s in named if isinstance(s, GroupStatistic)]
        self.gradients = any(
            s.gradients if isinstance(s, GroupStatistic) else not isinstance(s, InputStatistic) for s in named
        )
        self._group_sets = group_sets
        self._terms = terms
        self._ranks = ranks
        self._observed = observed_modules(group_sets)
        consumers = [part.module for s in group_sets for part in s.consumers]
        self._token_masks = TokenMasks(model, [*self._observed, *consumers])
        sums = {name for s in named if isinstance(s, InputStatistic) for name in s.sums}
        sums |= set(REPAIR_SUMS) if activations else set()
        self._inputs = ActivationObserver(model, group_sets, sorted(sums), self._token_masks) if sums else None
        by_masks, by_weights = split_mask_terms(terms, group_sets)
        self._weights = (
            _GradientCollector(model, root, group_sets, by_weights, mode, accumulator, ranks)
            if self.gradients
            else None
        )
        self._masks = MaskCollector(model, group_sets, by_masks, ranks, self._token_masks) if by_masks else None
        self._recorder = recorder
        self._own: dict[GroupStatistic, GroupObserver] = {
            s: s.observer(model, group_sets, *([self._token_masks] if s.token_masks else [])) for s in own
        }
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Observers:
        with contextlib.ExitStack() as stack:
            # before all others, which ask it which tokens are real
            stack.enter_context(self._token_masks)
            for observer in (self._inputs, self._weights, self._masks, *self._own.values()):
                if observer is not None:
                    stack.enter_context(observer)
            if self._recorder is not None:
                stack.enter_context(self._recorder.observed(self._token_masks))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start_batch(self, batch: object) -> None:
        """Take note of a batch before its forward pass."""
        self._token_masks.start_batch(batch)

    def skip_batch(self) -> None:
        """Drop what the forward pass of a batch left that does not count."""
        for observer in (self._inputs, self._masks, self._recorder, *self._own.values()):
            if observer is not None:
                observer.skip_batch()

    def end_batch(self, loss: Tensor | None) -> None:
        """Run the backward pass of a batch that counts, if one is needed, and take note of what both passes left."""
        if self._recorder is not None:
            self._recorder.take_batch()
        if self._weights is not None:
            assert loss is not None
            self._weights.start_batch()
            if self._masks is not None:
                self._masks.start_backward()
            loss.backward()
            self._weights.end_batch(self._masks.end_batch() if self._masks is not None else [])
        for observer in (self._inputs, *self._own.values()):
            if observer is not None:
                observer.end_batch()

    def finish(self, statistics: Statistics) -> None:
        """Put into the statistics what was observed, reduced over batches and processes.

        Raises:
            CalibrationError: If something was not finite, a module was not called, or an observer left out a group set.
        """
        if self._weights is not None:
            self._weights.finish(statistics)
        if self._masks is not None:
            statistics.reduced.update(self._masks.finish())
        for statistic, observer in self._own.items():
            values = self._reduced(statistic, observer)
            for term in (t for t in self._terms if t.statistic == statistic.name):
                statistics.reduced.update({(term, key, 0): term.function(value) for key, value in values.items()})
        if self._inputs is not None:
            statistics.activations = self._inputs.finish()
            self._check_inputs(statistics)

    def _check_inputs(self, statistics: Statistics) -> None:
        missing = sorted(set(self._observed) - set(statistics.activations))
        if not _everywhere(not missing, self._ranks):
            named = missing[:5] or "modules that another process's batches went through"
            raise CalibrationError(f"No calibration batch went through {named}; their inputs cannot be measured.")
        if self._ranks is not None:
            statistics.reduce_activations(self._ranks)
        for name, activation in statistics.activations.items():
            if not all(bool(value.isfinite().all()) for value in activation.sums.values()):
                raise CalibrationError(f"The inputs of {name!r} are not finite in calibration. Nothing was pruned.")

    def _reduced(self, statistic: GroupStatistic, observer: Any) -> dict[tuple[str, str], Tensor]:
        values: Mapping[tuple[str, str], Tensor] = observer.finish()
        wrong = [s.name for s in self._group_sets if s.key not in values or tuple(values[s.key].shape) != (s.size,)]
        if not _everywhere(not wrong, self._ranks):
            raise CalibrationError(
                f"The statistic {statistic.name!r} must give a tensor of shape (groups,) for every group set; found none for"
                f" {wrong[:3] or 'some on another process'}."
            )
        keys = [s.key for s in self._group_sets]
        whole = torch.cat([values[key].float() for key in keys])
        if self._ranks is not None:
            whole = self._ranks.sum(whole) / (self._ranks.size if statistic.over_ranks == "mean" else 1)
        if statistic.over_ranks == "ratio":
            counts = torch.cat([observer.counts()[key].float() for key in keys])
            whole = whole / (counts if self._ranks is None else self._ranks.sum(counts)).clamp_min(1)
        if not bool(whole.isfinite().all()):
            raise CalibrationError(
                f"The statistic {statistic.name!r} is not finite in calibration. Nothing was pruned."
            )
        return dict(zip(keys, whole.split([len(values[key]) for key in keys]), strict=True))
