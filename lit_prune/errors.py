"""The errors that lit_prune raises, so that callers can tell them from programming mistakes."""


class PruningError(Exception):
    """Base class of every error that lit_prune raises on purpose."""


class UnsupportedModelError(PruningError):
    """The model, or a part of it, has no description in :mod:`lit_prune.architectures`."""


class CalibrationError(PruningError):
    """Calibration met data, a loss or a gradient that no importance can be computed from."""


class BudgetError(PruningError):
    """The pruning ratio cannot be reached under the floors, protections and rounding that were asked for."""


class SmallBudgetError(BudgetError):
    """What is to be removed is less than the smallest group that may leave."""


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
