"""The errors that lit_prune raises, so that callers can tell them from programming mistakes."""

from __future__ import annotations

import traceback


class PruningError(Exception):
    """Base class of every error that lit_prune raises on purpose."""


class ArgumentError(PruningError):
    """An argument is not what it has to be; raised as one of the two below."""


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument is of the wrong type."""


class ArgumentValueError(ArgumentError, ValueError):
    """An argument is of the right type, and unknown or out of its range."""


class UnsupportedModelError(PruningError):
    """The model, or a part of it, cannot be pruned: no groups are known for it."""


class CalibrationError(PruningError):
    """Calibration met data, a loss or a gradient that no importance can be computed from."""


class BudgetError(PruningError):
    """The pruning ratio cannot be reached under the floors, protections and rounding that were asked for."""


class SmallBudgetError(BudgetError):
    """The budget is smaller than the smallest group that may be removed."""


class PlanError(PruningError):
    """A pruning plan is malformed or does not fit the model that it is applied to."""


class UnsupportedStrategyError(PruningError):
    """The Trainer's strategy holds the parameters in a way that surgery does not know."""


class RankMismatchError(PruningError):
    """The processes of a distributed run do not agree on what to cut."""


class RankError(PruningError):
    """Another process of a distributed run met an error; the message says which, and what error."""


class UnsupportedCallbackError(PruningError):
    """Another callback holds parts of the model that would be stale after the cut."""


class ReferenceHeldError(PruningError):
    """Something beside the model holds tensors of the sizes before the cut: a hook, a tied module, a copy by hand."""


class OptimizerStateError(PruningError):
    """The state of an optimizer cannot follow the cut."""


def first_line(error: BaseException) -> str:
    """Return the type and the first line of an error, at most 160 characters; of an empty one, where it was raised."""
    lines = str(error).strip().splitlines()
    if not lines:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f"in {frames[-1].name}: {frames[-1].line}" if frames else "without a message"]
    return f"{type(error).__name__}: {lines[0]}"[:160]
