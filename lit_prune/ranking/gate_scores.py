r"""Scores of gates: how important a group is given the others that are removed, learned from derivatives at the cut.

A criterion looks at the whole model and takes every group for itself. Of two groups that can stand in for each other it
finds both unimportant, and removes both. A gate is learned where the model is going to be: with a set of groups removed that
meets the budget, the derivative :math:`g_j` of the loss by the gate of group j (1 there, 0 removed) is measured for kept and
removed groups alike, which is the gradient of the straight-through estimator.

If nothing stood in for anything, the loss would be :math:`\sum_j c_j(1-m_j)^2` with the criterion's importance :math:`c_j`, and
so :math:`g_j` would be 0 for kept groups and :math:`-2c_j` for removed ones. What is measured beyond that, averaged over steps,
is what the other groups make of group j:

.. math:: s_j = c_j - \lambda_j\,(g_j + 2c_j[j\ \mathrm{removed}])

The criterion gives relative values; the unit of the loss comes from the removed groups, over which :math:`g_j+2c_j` is made to
be 0 in the mean. :math:`\lambda_j` shrinks a difference that is within the noise of its measurement (empirical Bayes, the noise
from the squares over samples and the spread of the differences by kind of group), so that a gate whose gradient is noise
stays where the criterion put it; that is what takes the place of a step size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_prune.errors import ArgumentValueError
from lit_prune.groups import GroupSet
from lit_prune.ranking.model_table import select_in_model
from lit_prune.ranking.selection import Limits
from lit_prune.ranking.table import GroupTable

_ARRAYS = ("prior", "slope", "square", "away")
_NUMBERS = ("spread", "measured", "expected", "samples")


class GateScores:
    """The scores of the gates of a model, and their projection on the budget.

    Args:
        model: The model.
        group_sets: Its group sets.
        table: The group table that the criterion made; its importance is what the scores begin with.
        budget: Parameters to remove.
        limits: Floors, protections and rounding.
        horizon: Steps that an average looks back, once there are so many.

    Attributes:
        steps: Number of updates.
        changed: Fraction of the groups that are removed now and were not at first.

    Raises:
        ArgumentValueError: If an importance is negative, or all are 0.
    """

    def __init__(
        self,
        model: nn.Module,
        group_sets: Sequence[GroupSet],
        table: GroupTable,
        budget: int,
        limits: Limits,
        horizon: int,
    ) -> None:
        self._model, self._group_sets, self._table = model, group_sets, table
        self._budget, self._limits, self._horizon = budget, limits, horizon
        self.prior = table.importance.copy()
        if (self.prior < 0).any() or not self.prior.any():
            raise ArgumentValueError(
                "Gates begin with the importance of a criterion, which has to be 0 or more for every group and more for some;"
                f" found {self.prior.min():.3g} to {self.prior.max():.3g}. Take another criterion, fisher for instance."
            )
        self.slope, self.square, self.away = (np.zeros(len(table)) for _ in range(3))
        # sum of the squared weights of the averages, and the two sums that the unit comes from
        self.spread, self.measured, self.expected = 1.0, 0.0, 0.0
        self.samples, self.steps = 0.0, 0
        self._project()
        self._first = table.kept.copy()

    @property
    def kept(self) -> list[Tensor]:
        """Which groups the gates let through, bool tensors of shape ``(groups,)`` by group set; those in a removed block, too."""
        return [torch.from_numpy(k) for k in np.split(self._table.kept.copy(), self._table.offsets[1:-1])]

    @property
    def removed(self) -> int:
        """Number of parameters that would leave."""
        return self._removed

    @property
    def changed(self) -> float:
        """Fraction of the groups removed at first that are there now."""
        return float((~self._first & self._table.kept).sum() / max((~self._first).sum(), 1))

    def importance(self) -> list[Tensor]:
        """Return the scores by group set, float64 tensors of shape ``(groups,)``, in the unit of the loss."""
        return list(torch.from_numpy(self._scores()).split(self._table.sizes.tolist()))

    def update(self, slope: Sequence[Tensor], square: Sequence[Tensor], samples: int) -> bool:
        """Take the derivatives of a step, and project the scores on the budget again.

        Args:
            slope: By group set the mean over the step's samples of the derivative by each gate, shape ``(groups,)``.
            square: The mean of its square, likewise.
            samples: Number of samples.

        Returns:
            Whether they were finite; if not, nothing changes.
        """
        first, second = (torch.cat([v.double().cpu() for v in values]).numpy() for values in (slope, square))
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            return False
        rate = max(1 / (self.steps + 1), 1 / self._horizon)
        # what is in a removed block gets no gradient, and has no news
        inside = ~np.append(self._table.kept, True)[self._table.block_of_row]
        gone = ~self._table.kept & ~inside
        share = np.where(inside, 0.0, rate)
        self.slope += share * (first - self.slope)
        self.square += share * (second - self.square)
        self.away += share * (gone - self.away)
        self.spread = (1 - rate) ** 2 * self.spread + rate**2 if self.steps else 1.0
        self.measured += rate * (-first[gone].sum() - self.measured)
        self.expected += rate * (2 * self.prior[gone].sum() - self.expected)
        self.samples += rate * (samples - self.samples)
        self.steps += 1
        self._project()
        return True

    def _scores(self) -> np.ndarray:
        if not self.steps:
            return self.prior.copy()
        unit = self.measured / self.expected if self.expected > 0 else 0.0
        if unit <= 0:
            # removing them is no loss at all, so that nothing says what a unit of the criterion is worth
            return self.prior.copy()
        scores = unit * self.prior
        difference = -(self.slope + 2 * scores * self.away)
        noise = np.maximum(self.square - self.slope**2, 0) * self.spread / max(self.samples, 1.0)
        shrink = np.zeros_like(scores)
        kinds = self._table.kind_of_row
        for kind in np.unique(kinds):
            rows = kinds == kind
            squares = float((scores[rows] ** 2).sum())
            excess = float((difference[rows] ** 2 - noise[rows]).sum())
            if squares > 0 and excess > 0:
                signal = excess / squares * scores[rows] ** 2
                shrink[rows] = signal / np.maximum(signal + noise[rows], np.finfo(float).tiny)
        return scores + shrink * difference

    def _project(self) -> None:
        self._table.importance = self._scores()
        self._removed = select_in_model(self._model, self._group_sets, self._table, self._budget, self._limits)

    def state_dict(self) -> dict[str, Any]:
        """The scores and averages, as tensors and numbers."""
        arrays = {name: torch.from_numpy(getattr(self, name).copy()) for name in _ARRAYS}
        numbers = {name: float(getattr(self, name)) for name in _NUMBERS}
        return {**arrays, **numbers, "steps": self.steps, "first": torch.from_numpy(self._first.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the scores and averages of a run that was interrupted."""
        for name in _ARRAYS:
            setattr(self, name, state[name].numpy().copy())
        for name in _NUMBERS:
            setattr(self, name, state[name])
        self.steps = state["steps"]
        self._first = state["first"].numpy().copy()
        self._project()
