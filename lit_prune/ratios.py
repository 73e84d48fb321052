"""Plans for several pruning ratios from one calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from lit_prune.arguments import RATIO, sequence_of
from lit_prune.calibration.statistics import Statistics
from lit_prune.config import PruningConfig
from lit_prune.errors import ArgumentValueError
from lit_prune.groups import GroupSet
from lit_prune.plan import PruningPlan
from lit_prune.planning import make_plan
from lit_prune.ranking.table import GroupTable


@dataclass(frozen=True)
class RatioPlan:
    """A plan for one ratio, and what is known of it before anything is cut.

    Args:
        ratio: The pruning ratio that was asked for.
        table: The group table.
        plan: The plan.
        loss: What ``measure`` gave for the plan, the loss of the masked model for instance; ``None`` if nothing was measured.
    """

    ratio: float
    table: GroupTable
    plan: PruningPlan
    loss: float | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters after the cut."""
        return int(self.plan.info["parameters_after"])

    @property
    def importance_removed(self) -> float:
        """Share of the importance of all groups that is removed, from 0 to 1."""
        importance = self.table.importance.clip(min=0)
        return float(importance[~self.table.kept].sum() / max(float(importance.sum()), 1e-300))


RATIOS = sequence_of("at least one number, each strictly between 0 and 1", RATIO, empty=False)


def checked_ratios(
    model: nn.Module, group_sets: Sequence[GroupSet], config: PruningConfig, ratios: Sequence[float]
) -> list[PruningConfig]:
    """A configuration for each different ratio, the smallest first, of which each can be reached.

    Raises:
        BudgetError: If a ratio cannot be reached.
        ArgumentTypeError: If a ratio is no number.
        ArgumentValueError: If one is out of its range, or there is none.
    """
    checked = sorted(set(RATIOS.check("ratios", ratios)))
    if config.budget is not None:
        raise ArgumentValueError(f"Give ratios or a budget; found {checked} and {config.budget}.")
    configs = [replace(config, pruning_ratio=ratio, iterations=1, quality=None) for ratio in checked]
    for each in configs:
        each.check(model, group_sets)
    return configs


def plan_ratios(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    statistics: Statistics | None,
    config: PruningConfig,
    ratios: Sequence[float],
    *,
    measure: Callable[[PruningPlan], float] | None = None,
) -> list[RatioPlan]:
    """Make a plan for each of several ratios from the same statistics.

    Each plan is that of a single cut: what :func:`lit_prune.prune` does with ``iterations=1``. A second iteration would need
    statistics of the model after the first cut.

    Args:
        model: The model; it is not changed.
        group_sets: Its group sets.
        statistics: What :func:`lit_prune.calibrate` collected, or :meth:`Statistics.load` read; may be ``None`` for a criterion
            that needs nothing.
        config: The configuration; its own ratio and iterations do not count.
        ratios: The ratios, in any order.
        measure: What a plan costs, its masked loss for instance; called for every plan.

    Returns:
        A plan for each different ratio, the smallest ratio first.

    Raises:
        BudgetError: If a ratio cannot be reached; before any plan is made.
        ArgumentTypeError: If a ratio is no number.
        ArgumentValueError: If one is out of its range, or there is none.
    """
    configs = checked_ratios(model, group_sets, config, ratios)
    made = []
    for each in configs:
        table, plan = make_plan(model, group_sets, statistics, each, measure=measure)
        made.append(RatioPlan(each.pruning_ratio, table, plan, None if measure is None else measure(plan)))
    return made
