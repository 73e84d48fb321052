r"""Scores of gates: how important a group is given the others that are removed, learned from derivatives at the cut.

A criterion looks at the whole model and takes every group for itself. Of two groups that can stand in for each other it
finds both unimportant, and removes both. A gate is learned where the model is going to be: with a set of groups removed that
meets the budget, the derivative :math:`g_j` of the loss by the gate of group j (1 there, 0 removed) is measured for kept and
removed groups alike, which is the gradient of the straight-through estimator.

If nothing stood in for anything, the loss would be :math:`\sum_j c_j(1-m_j)^2` with the criterion's importance :math:`c_j`,
and so :math:`g_j` would be 0 for a kept group and :math:`-2c_j` for a removed one. Both are averaged over the steps in which the
group was the one or the other, and what removing it costs is the mean of the two (the trapezoid rule):

.. math:: s_j = -\tfrac12\left(g_j^{kept}+g_j^{removed}\right),

where a side that was never seen is taken to be :math:`2c_j` from the other. A group that turned out to be worth more than its
:math:`c_j` when it was removed is so remembered.

Where what is removed is predicted from what stays, :math:`c_j` is the criterion's importance times the share of the group that
the kept ones do not predict, and changes with the set.

The criterion gives relative values; in the unit of the loss :math:`2\sum_j c_j` is the trace of its Hessian by the gates, which
is measured where all are there. A derivative that differs from what is expected by no more than the noise of its measurement is
shrunk towards that (empirical Bayes, the noise from the squares over samples and the spread of the differences by kind of group),
so that a gate whose gradient is noise stays where the criterion put it; that is what takes the place of a step size. In a step
only the few groups change places whose scores are the furthest out of order (:data:`PACE`): two that stand in for each other
would come and go together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_prune.errors import ArgumentValueError
from lit_prune.groups import GroupSet, count_removed
from lit_prune.ranking.model_table import select_in_model
from lit_prune.ranking.selection import Limits
from lit_prune.ranking.table import GroupTable

_ARRAYS = ("prior", "share", "slope", "square", "visits", "spread")
_NUMBERS = ("unit", "samples")
# the empirical Fisher information of a sample, taken for the curvature of the loss
UNIT = 0.5
# largest fraction of the removed groups that changes in a step, if that is more than one group
PACE = 0.02
_BISECTIONS = 16


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
        self.share = np.ones(len(table))
        # while a group was removed, and while it was kept; spread is the sum of the squared weights of an average
        self.slope, self.square, self.visits, self.spread = (np.zeros((2, len(table))) for _ in range(4))
        self.unit, self.samples, self.steps = UNIT, 0.0, 0
        self._select(self.prior)
        self._first = table.kept.copy()

    def start(self, shares: Sequence[Tensor]) -> None:
        """Begin with the set of the criterion's importance times the square root of some shares (see :meth:`set_shares`).

        That is what the configuration's ``compensation`` ranks by.
        """
        self._select(self.prior * np.sqrt(torch.cat(list(shares)).cpu().numpy()))
        self._first = self._table.kept.copy()

    def set_shares(self, shares: Sequence[Tensor]) -> None:
        """Take the shares of the groups that the kept ones do not predict, by group set, shape ``(groups,)``, from now on."""
        self.share = torch.cat(list(shares)).double().cpu().numpy().copy()

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

    def measure_unit(self, trace: float) -> None:
        """Take the unit of the loss from the trace of its Hessian by all gates; left as it is if that is not positive."""
        unit = trace / (2 * float((self.prior * self.share).sum()))
        if np.isfinite(unit) and unit > 0:
            self.unit = unit

    def importance(self) -> list[Tensor]:
        """Return the scores that the groups were selected by last, float64 tensors of shape ``(groups,)``, by group set."""
        return list(torch.from_numpy(self._table.importance.copy()).split(self._table.sizes.tolist()))

    def update(self, slope: Sequence[Tensor], square: Sequence[Tensor], samples: Sequence[float]) -> bool:
        """Take the derivatives of a step, and project the scores on the budget again.

        Args:
            slope: By group set the mean over the step's samples of the derivative by each gate, shape ``(groups,)``.
            square: The mean of its square, likewise.
            samples: By group set the number of samples; one of 0 has no news.

        Returns:
            Whether they were finite; if not, nothing changes.
        """
        first, second = (torch.cat([v.double().cpu() for v in values]).numpy() for values in (slope, square))
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            return False
        # what is in a removed block gets no gradient, and has no news
        inside = ~np.append(self._table.kept, True)[self._table.block_of_row]
        news = ~inside & np.repeat(np.array(samples) > 0, self._table.sizes)
        here = np.stack([~self._table.kept & news, self._table.kept & news])
        rate = np.where(here, np.maximum(1 / (self.visits + 1), 1 / self._horizon), 0.0)
        self.slope += rate * (first - self.slope)
        self.square += rate * (second - self.square)
        self.spread = (1 - rate) ** 2 * self.spread + rate**2
        self.visits += here
        self.samples += max(1 / (self.steps + 1), 1 / self._horizon) * (max(samples) - self.samples)
        self.steps += 1
        self._project()
        return True

    @property
    def _curvature(self) -> np.ndarray:
        return self.unit * self.prior * self.share

    def _scores(self) -> np.ndarray:
        curvature = self._curvature
        expected = np.stack([-2 * curvature, np.zeros_like(curvature)])
        noise = np.maximum(self.square - self.slope**2, 0) * self.spread / max(self.samples, 1.0)
        difference = np.where(self.visits > 0, self.slope - expected, 0.0)
        kinds = self._table.kind_of_row
        for kind in np.unique(kinds):
            seen = (self.visits > 0) & (kinds == kind)
            squares = float((np.broadcast_to(curvature, seen.shape)[seen] ** 2).sum())
            excess = float((difference[seen] ** 2 - noise[seen]).sum())
            signal = (max(excess, 0.0) / squares if squares > 0 else 0.0) * curvature**2
            shrink = signal / np.maximum(signal + noise, np.finfo(float).tiny)
            difference = np.where(seen, shrink * difference, difference)
        removed, kept = expected + difference
        # a side that was never visited lies as far from the other as the curvature says
        removed = np.where(self.visits[0] > 0, removed, kept - 2 * curvature)
        kept = np.where(self.visits[1] > 0, kept, removed + 2 * curvature)
        return -(removed + kept) / 2

    def _project(self) -> None:
        """Select by the scores, with a margin in favour of the groups as they are that lets no more of them change than PACE."""
        scores, before = self._scores(), self._table.kept.copy()
        self._select(scores)
        most = max(1, int(PACE * (~before).sum()))
        if not self.steps or self._came_back(before) <= most:
            return
        # margins that differ a little tell groups of equal scores apart
        width = np.ptp((scores / self._table.cost)[before != self._table.kept])
        margin = width * self._table.cost * (1 + 0.1 * np.random.default_rng(0).random(len(scores)))
        margin[~before] *= -1
        low, high = 0.0, 1.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            self._select(scores + middle * margin)
            low, high = (low, middle) if self._came_back(before) <= most else (middle, high)
        self._select(scores + high * margin)

    def _came_back(self, before: np.ndarray) -> int:
        return int((~before & self._table.kept).sum())

    def _select(self, scores: np.ndarray) -> None:
        self._table.importance = scores
        self._removed = select_in_model(self._model, self._group_sets, self._table, self._budget, self._limits)

    def state_dict(self) -> dict[str, Any]:
        """The scores and averages, as tensors and numbers."""
        arrays = {name: torch.from_numpy(getattr(self, name).copy()) for name in _ARRAYS}
        numbers = {name: float(getattr(self, name)) for name in _NUMBERS}
        return {**arrays, **numbers, "steps": self.steps, **self._sets()}

    def _sets(self) -> dict[str, Tensor]:
        arrays = {"first": self._first, "kept": self._table.kept, "selected": self._table.importance}
        return {name: torch.from_numpy(values.copy()) for name, values in arrays.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the scores and averages of a run that was interrupted."""
        for name in _ARRAYS:
            setattr(self, name, state[name].numpy().copy())
        for name in _NUMBERS:
            setattr(self, name, state[name])
        self.steps = state["steps"]
        self._first, self._table.kept = state["first"].numpy().copy(), state["kept"].numpy().copy()
        self._table.importance = state["selected"].numpy().copy()
        self._removed = count_removed(self._model, self._group_sets, self._table.removed_groups())
