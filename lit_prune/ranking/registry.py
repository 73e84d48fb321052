"""The criteria by name, and how to add one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_prune.calibration.statistic_registry import GroupStatistic, InputStatistic, MaskStatistic, get_statistic
from lit_prune.calibration.terms import Term
from lit_prune.ranking.criteria import (
    fisher,
    fluctuation,
    magnitude,
    output_wanda,
    reap,
    second_order,
    taylor,
    wanda,
)

NORMALIZATIONS = ("mean", "kind", "standard")


@dataclass(frozen=True)
class Criterion:
    """A named way to compute the importance of groups.

    Args:
        name: The name a user gives.
        terms: The summands.
        normalize: ``"mean"`` divides the importance of a group by the mean score of its (layer, kind), so that the
            mean score (importance / cost) is 1 everywhere and a global ranking compares each group with its own kind;
            ``"kind"`` does so for each kind over all layers; ``"standard"`` subtracts the mean score of its (layer, kind)
            and divides by the standard deviation, as FLAP does; ``None`` leaves the sums as they are, which is right for
            the criteria that estimate the loss.
    """

    name: str
    terms: tuple[Term, ...]
    normalize: str | None = None

    @property
    def statistics(self) -> frozenset[str]:
        """Names of the statistics that calibration has to provide."""
        return frozenset(t.statistic for t in self.terms if t.statistic is not None)


def _half_square(product: Tensor) -> Tensor:
    return product.square_().mul_(0.5)


_FIRST = Term(taylor, "gradient", of_product=torch.abs_)


_SECOND = Term(second_order, "squared_gradient", of_product=_half_square)


# of what is no expert: the mean norm of what an input feature adds to the output
_OUTPUT_NORM = Term(output_wanda, "activation_mean_abs", consumers_only=True, per_input=True)


_REGISTRY: dict[str, Criterion] = {
    c.name: c
    for c in (
        Criterion("taylor", (_FIRST,)),
        Criterion("taylor_2nd", (_FIRST, _SECOND)),
        Criterion("taylor_batch", (Term(taylor, "absolute_gradient", of_product=torch.abs_),)),
        Criterion("fisher", (Term(fisher, "mask_gradient", per_group=True),)),
        Criterion("second_order", (_SECOND,)),
        Criterion("wanda", (Term(wanda, "activation_mean_abs"),), normalize="mean"),
        Criterion("output_wanda", (Term(output_wanda, "activation_l2", True, True),), normalize="mean"),
        Criterion("flap", (Term(fluctuation, "activation_variance", True, True),), normalize="standard"),
        Criterion("reap", (Term(reap, "routed_output", per_group=True), _OUTPUT_NORM), normalize="mean"),
        Criterion("magnitude", (Term(magnitude),)),
        Criterion("random", ()),
    )
}


def register_criterion(
    name: str | Criterion,
    function: Callable[..., Tensor] | None = None,
    statistic: str | None = None,
    *,
    consumers_only: bool = False,
    normalize: str | None = None,
) -> Criterion:
    """Register a criterion under a name.

    Args:
        name: The name, which must be free; or a whole :class:`Criterion`, for one of several terms, or of terms that need more
            than a function and a statistic. The other arguments are then left out.
        function: Maps a parameter, and the statistic if one is named, to the importance of each element, a tensor of
            the parameter's shape.
        statistic: The name of a statistic, ours or one of :func:`register_statistic`, or ``None``. With ``"mask_gradient"`` the
            function takes that alone, as :func:`fisher` does, and is averaged over the samples; with a
            :class:`GroupStatistic` it takes that alone, too. With ``"absolute_gradient"`` and ``"squared_gradient"``
            calibration in the mode ``"streaming"`` averages what the function gives for each batch, which is the function of
            the average only if it is linear in the statistic.
        consumers_only: Whether only the projections that read the groups count.
        normalize: See :class:`Criterion`.

    Raises:
        TypeError: If there is no function, or one beside a whole criterion.
        ValueError: If the name is taken, the statistic or normalisation is unknown, or a term does not take its statistic as
            that is.

    Example::

        register_criterion("variance", lambda w, var: w.square() * var, "activation_variance", consumers_only=True)
        register_criterion(Criterion("both", (Term(first, "gradient"), Term(second, "squared_gradient"))))
    """
    if isinstance(name, Criterion):
        if function is not None or statistic is not None:
            raise TypeError(
                f"The criterion {name.name!r} says what it computes; found a function or statistic beside it."
            )
        criterion = name
    elif function is None:
        raise TypeError(f"register_criterion({name!r}) needs a function; found none.")
    else:
        term = Term(function, statistic, consumers_only, per_group=_is_of_groups(statistic))
        criterion = Criterion(name, (term,), normalize)
    if criterion.name in _REGISTRY:
        raise ValueError(f"There is a criterion named {criterion.name!r} already.")
    for used in criterion.terms:
        _check_term(criterion.name, used)
    check_normalization(criterion.normalize)
    _REGISTRY[criterion.name] = criterion
    return criterion


def _is_of_groups(statistic: str | None) -> bool:
    return statistic is not None and isinstance(get_statistic(statistic), (MaskStatistic, GroupStatistic))


def _check_term(criterion: str, term: Term) -> None:
    """Refuse a term whose function would be called with a statistic of another kind.

    Raises:
        ValueError: Naming criterion and statistic, and what to set.
    """
    if term.per_group != _is_of_groups(term.statistic):
        what = "of groups" if not term.per_group else "not of groups"
        raise ValueError(
            f"A term of {criterion!r} has per_group={term.per_group}, and its statistic {term.statistic!r} is {what}: set"
            f" per_group={not term.per_group}."
        )
    if term.per_input and not (term.statistic and isinstance(get_statistic(term.statistic), InputStatistic)):
        raise ValueError(
            f"A term of {criterion!r} has per_input=True, which takes a statistic of inputs (an InputStatistic); found"
            f" {term.statistic!r}."
        )


def criteria() -> tuple[str, ...]:
    """Names of the known criteria."""
    return tuple(_REGISTRY)


def get_criterion(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        ValueError: If there is none; the message lists the known ones.
    """
    if name not in _REGISTRY:
        raise ValueError(f"Unknown importance criterion {name!r}; known are {', '.join(_REGISTRY)}.")
    return _REGISTRY[name]


def check_normalization(normalize: str | None) -> None:
    """Refuse an unknown normalisation.

    Raises:
        ValueError: If it is neither ``None`` nor one of :data:`NORMALIZATIONS`.
    """
    if normalize is not None and normalize not in NORMALIZATIONS:
        raise ValueError(f"Unknown normalisation {normalize!r}; expected None or one of {', '.join(NORMALIZATIONS)}.")
