"""A budget against a model: what each limit is in the base unit, and how the quantity follows from what stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lit_prune.budgets.amounts import format_amount
from lit_prune.budgets.budget import units_of


class Quantity(Protocol):
    """Something that the pruned model takes, as a function of the number of groups that stay in every set."""

    def value(self, kept: np.ndarray) -> float:
        """The quantity in its base unit; ``kept`` is an int array of shape ``(sets,)``."""

    def saved(self, kept: np.ndarray) -> np.ndarray:
        """What one more group of each set saves, float array of shape ``(sets,)``; a block saves all that is left in it."""


@dataclass(eq=False)
class Resource:
    """A quantity with an upper limit.

    Args:
        name: What it is, as :attr:`Budget.limits` calls it.
        quantity: How it follows from what stays.
        target: The limit in the base unit; infinite for something that is only reported.
    """

    name: str
    quantity: Quantity
    target: float

    def shown(self, value: float) -> str:
        """A value with its unit."""
        return format_amount(value, units_of(self.name))
