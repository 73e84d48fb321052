"""The statistics that a term can name, and how to add one.

A statistic says what is observed in every calibration batch, how batches and processes are reduced to one value, and where
:class:`~lit_prune.calibration.statistics.Statistics` keeps it. There are three ways to observe, a class each:

=======================  ================================  ================================  =========================
class                    observed in a batch               over batches and processes        kept in
=======================  ================================  ================================  =========================
`GradientStatistic`      a function of a weight's          mean of the function; gradients   `elementwise`, or reduced
                         gradient                          are averaged over processes       to groups in `reduced`
                                                           before the function
`InputStatistic`         sums of functions of a            sums over the tokens of all       `activations`
                         projection's inputs               batches and processes, then
                                                           `value` of the sums
`GroupStatistic`         whatever an observer of your      the observer's own sum, then      `reduced`
                         own computes for each group       mean, sum or ratio over the
                                                           processes
=======================  ================================  ================================  =========================

Nothing of this is written to a file: a checkpoint holds the plan, not what it was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Protocol

import torch
from torch import Tensor

from lit_prune.calibration.routed_outputs import RoutedOutputs

Key = tuple[str, str]


@dataclass(frozen=True)
class GradientStatistic:
    """The mean over batches of a function of a weight's gradient; a term's function gets it with the weight.

    Args:
        name: The name that terms use.
        function: Maps a batch's gradient (float32) to a tensor of its shape. ``None`` for the gradient itself: its mean is
            then kept element by element, and a term's function is given that. With a function, calibration in the mode
            ``"streaming"`` averages what the term's function gives for each batch, which is the function of the average
            only if it is linear in the statistic; the mode ``"elementwise"`` keeps the average.
    """

    name: str
    function: Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class InputStatistic:
    """One number for each input feature of a projection, from sums over the real tokens of all batches.

    A bias or a norm's scale multiplies the constant 1 in every token; its value is worked out from that.

    Args:
        name: The name that terms use.
        sums: By name, functions of inputs of shape ``(tokens, features)`` (float32), element by element; each is summed over
            the tokens, in float64. Statistics that name the same sum share it.
        value: Maps the sums by name (float64, shape ``(features,)``) and the number of tokens to the statistic.
    """

    name: str
    sums: Mapping[str, Callable[[Tensor], Tensor]] = field(hash=False)
    value: Callable[[Mapping[str, Tensor], int], Tensor]

    def of_constant(self, tokens: int) -> float:
        """Return the statistic of an input that is 1 in every token."""
        ones = torch.ones(1, 1, dtype=torch.float32)
        sums = {name: function(ones).double().sum(dim=0) * tokens for name, function in self.sums.items()}
        return float(self.value(sums, tokens))


class GroupObserver(Protocol):
    """Observes a model while it is calibrated: a context manager, whose hooks are there within the context."""

    def __enter__(self) -> object:
        """Begin to observe."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None:
        """Stop, and leave no hook behind."""

    def end_batch(self) -> None:
        """Take note of a batch that counts, after its backward pass if there is one."""

    def skip_batch(self) -> None:
        """Drop what the forward pass of a batch left that does not count."""

    def finish(self) -> Mapping[Key, Tensor]:
        """Return, by :attr:`GroupSet.key`, this process's statistic: tensors of shape ``(groups,)``, for every group set."""


@dataclass(frozen=True)
class GroupStatistic:
    """One number for each group, from an observer of your own; a term with ``per_group=True`` gets it without the weight.

    Args:
        name: The name that terms use.
        observer: Makes the observer of a model and its group sets.
        over_ranks: How the processes of a distributed run, each with batches of its own, are put together.
            ``"ratio"`` divides the sum of what ``finish`` gives by the sum of what the observer's ``counts`` gives, 0 where that
            is 0.
        gradients: Whether a backward pass is run for every batch.
        token_masks: Whether ``observer`` is given the :class:`~lit_prune.calibration.token_masks.TokenMasks` of the calibration,
            too.
    """

    name: str
    observer: Callable[..., GroupObserver]
    over_ranks: Literal["mean", "sum", "ratio"] = "mean"
    gradients: bool = False
    token_masks: bool = False


@dataclass(frozen=True)
class MaskStatistic:
    """The derivative of the loss by a mask of each group; :func:`lit_prune.calibration.observers.split_mask_terms` says how.

    A term with ``per_group=True`` gets it by sample, shape ``(samples, groups)``, and is averaged over all samples.

    Args:
        name: The name that terms use.
    """

    name: str


Statistic = GradientStatistic | InputStatistic | GroupStatistic | MaskStatistic


def _square(values: Tensor) -> Tensor:
    # exact for float32: a variance is the small difference of two of their means where the mean is large
    return values.double().square()


def _variance(sums: Mapping[str, Tensor], count: int) -> Tensor:
    return (sums["sum_squares"] / count - (sums["sum"] / count).square()).clamp_min(0)


_SUM = {"sum": torch.Tensor.detach}
_SUM_ABS = {"sum_abs": torch.abs}
_SUM_SQUARES = {"sum_squares": _square}
_REGISTRY: dict[str, Statistic] = {
    s.name: s
    for s in (
        GradientStatistic("gradient", None),
        GradientStatistic("absolute_gradient", torch.abs),
        GradientStatistic("squared_gradient", torch.square),
        MaskStatistic("mask_gradient"),
        InputStatistic("activation_mean_abs", _SUM_ABS, lambda sums, count: sums["sum_abs"] / count),
        InputStatistic("activation_l1", _SUM_ABS, lambda sums, count: sums["sum_abs"]),
        InputStatistic("activation_l2", _SUM_SQUARES, lambda sums, count: sums["sum_squares"].sqrt()),
        InputStatistic("activation_variance", {**_SUM, **_SUM_SQUARES}, _variance),
        GroupStatistic("routed_output", RoutedOutputs, over_ranks="ratio", token_masks=True),
    )
}
# by the name of a sum of inputs, the function that is summed
INPUT_SUMS: dict[str, Callable[[Tensor], Tensor]] = {**_SUM, **_SUM_ABS, **_SUM_SQUARES}


def register_statistic(statistic: GradientStatistic | InputStatistic | GroupStatistic) -> None:
    """Make a statistic of your own known, so that the terms of a criterion can name it.

    Args:
        statistic: The statistic.

    Raises:
        TypeError: If it is none of the three classes.
        ValueError: If its name is taken, or one of its sums has the name of another one that is known.

    Example::

        register_statistic(GradientStatistic("cubed_gradient", lambda g: g.abs() ** 3))
        register_criterion("cubed", lambda weight, cubed: weight.abs() ** 3 * cubed, "cubed_gradient")
    """
    if not isinstance(statistic, (GradientStatistic, InputStatistic, GroupStatistic)):
        raise TypeError(
            "register_statistic takes a GradientStatistic, an InputStatistic or a GroupStatistic; found a"
            f" {type(statistic).__name__}."
        )
    if statistic.name in _REGISTRY:
        raise ValueError(f"There is a statistic named {statistic.name!r} already.")
    if isinstance(statistic, InputStatistic):
        for name, function in statistic.sums.items():
            if INPUT_SUMS.get(name, function) is not function:
                raise ValueError(
                    f"The statistic {statistic.name!r} has a sum {name!r}, and that name stands for another function. Name it"
                    " otherwise."
                )
        INPUT_SUMS.update(statistic.sums)
    _REGISTRY[statistic.name] = statistic


def statistic_names() -> tuple[str, ...]:
    """Return the names of the known statistics."""
    return tuple(_REGISTRY)


def get_statistic(name: str) -> Statistic:
    """Return the statistic of that name.

    Raises:
        ValueError: If there is none; the message lists the known ones.
    """
    if name not in _REGISTRY:
        raise ValueError(f"Unknown statistic {name!r}; known are {', '.join(_REGISTRY)}.")
    return _REGISTRY[name]
