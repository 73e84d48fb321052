"""Budgets within the pipeline: measured before any work, corrected by trial cuts, and reported against what was measured."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from lit_prune.budgets.budget import LATENCY, MEMORY, PARAMS, Budget
from lit_prune.budgets.goals import Goals
from lit_prune.budgets.resources import Resource
from lit_prune.budgets.sizes import SizeModel, SizeSum
from lit_prune.budgets.workloads import takes_tokens
from lit_prune.calibration.statistics import Statistics
from lit_prune.config import PruningConfig
from lit_prune.distributed.ranks import Ranks
from lit_prune.errors import BudgetError
from lit_prune.groups import GroupSet
from lit_prune.plan import PruningPlan, get_plan, set_plan
from lit_prune.planning import make_plan
from lit_prune.ranking.budget_selection import trade_offs
from lit_prune.ranking.model_table import original_sizes
from lit_prune.ranking.table import GroupTable

BUDGETS = "budgets"
# FLOPs are sums of floating-point numbers
_ROUNDING = 1 + 1e-9


def find_goals(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    config: PruningConfig,
    data: Callable[[], contextlib.AbstractContextManager[tuple[Any, Callable[[Any], Tensor | None]]]],
    ranks: Ranks | None,
) -> Goals | None:
    """The goals of the configuration's budget; ``None`` if it has none.

    Args:
        model: The model, before any cut.
        group_sets: Its group sets.
        config: The configuration.
        data: Gives a context with calibration batches and the loss function.
        ranks: The processes of a distributed run.

    Raises:
        BudgetError: If the budget asks for something that the model does not have, or for times in a distributed run, whose
            processes would measure different ones.
    """
    if config.budget is None:
        return None

    @contextlib.contextmanager
    def example() -> Iterator[Callable[[], Tensor | None]]:
        with data() as (batches, loss):
            batch = next(iter(batches))
            yield lambda: loss(batch)

    check_distributed(config, ranks)
    return config.goals(model, group_sets, example)


def check_before_fit(
    model: nn.Module, group_sets: Sequence[GroupSet], config: PruningConfig, ranks: Ranks | None
) -> None:
    """Check at the start of a fit that the ratio or budget can be reached.

    A budget of FLOPs or latency of a model that takes no token ids needs a calibration batch; it is checked where there is
    one, at the stage, before its calibration.

    Raises:
        BudgetError: If it cannot.
    """
    check_distributed(config, ranks)
    budget = None if config.budget is None else Budget.of(config.budget)
    if budget is None or takes_tokens(model) or {*budget.asked} <= {PARAMS, MEMORY}:
        config.check(model, group_sets)


def check_distributed(config: PruningConfig, ranks: Ranks | None) -> None:
    """Refuse to measure times in several processes.

    Raises:
        BudgetError: If the configuration asks for that.
    """
    if ranks is not None and config.budget is not None:
        budget = Budget.of(config.budget)
        if budget.phases and budget.latency_table is None:
            raise BudgetError(
                "A budget of latency in a distributed run needs budget.latency_table, as its processes would measure different"
                " times. Measure them before, with lit_prune.measure_latency, and give the file."
            )


def correct_goals(
    model: nn.Module, group_sets: Sequence[GroupSet], statistics: Statistics, config: PruningConfig, goals: Goals
) -> None:
    """Correct predicted times by trial cuts, timed and undone, before the first cut of a run.

    Args:
        model: The model, before any cut.
        group_sets: Its group sets.
        statistics: What calibration collected.
        config: The configuration of the run.
        goals: The goals.
    """
    if not goals.measures_here:
        return
    name = next(iter(config.candidates))
    weights = config.candidates[name]
    whole = replace(config, importance=dict(weights), budget_share=1.0)

    def propose() -> tuple[PruningPlan, Mapping[str, float]]:
        _, plan = make_plan(model, group_sets, statistics, whole, goals=goals)
        return plan, plan.info["predicted"]

    goals.correct(model, propose)


def with_measured(model: nn.Module, plan: PruningPlan, goals: Goals | None, *, cut: bool) -> PruningPlan:
    """The plan with what was asked, predicted and measured of every limit in its ``info``, noted on the model as well.

    Args:
        model: The model after the last cut.
        plan: The plan.
        goals: The goals; the plan stays as it is if ``None``.
        cut: Whether the model was cut, so that there is something to measure.

    Warns:
        UserWarning: If the model takes more than what was asked of something other than time, which varies.
    """
    if goals is None:
        return plan
    info = {key: value for key, value in plan.info.items() if key not in ("predicted", "budget_share", "budget")}
    info[BUDGETS] = goals.rows(plan.info["predicted"], goals.measure(model) if cut else {})
    for row in info[BUDGETS]:
        if not row["name"].startswith(LATENCY) and row.get("measured", 0) > row["target"] * _ROUNDING:
            warnings.warn(
                f"The pruned model misses its budget of {row['name']}: {row['target']:,.0f} was asked, {row['predicted']:,.0f}"
                f" predicted, {row['measured']:,.0f} is measured. Ask for less, and please report the model.",
                stacklevel=2,
            )
    noted = get_plan(model)
    if cut and noted is not None:
        first = {key: value for key, value in noted.info.items() if key == "parameters_before"}
        set_plan(model, replace(noted, info={**noted.info, **info, **first}))
    return replace(plan, info=info)


def with_trade_offs(
    model: nn.Module, group_sets: Sequence[GroupSet], table: GroupTable, config: PruningConfig, goals: Goals | None
) -> GroupTable:
    """The table with what computes its trade-offs for every limit, or for parameters if there is no budget, once the model is
    cut and a report asks."""
    if goals is None:
        sizes = SizeModel(model, group_sets)
        ones = np.ones(len(sizes.names), dtype=np.int64)
        count = SizeSum(sizes, ones, np.zeros(len(group_sets), dtype=np.int64))
        resources, multiple = [Resource(PARAMS, count, 0.0)], None
    else:
        resources, multiple = config.resources(model, group_sets, goals)
    planned = partial(trade_offs, table, resources, config.limits, original_sizes(model), multiple)
    return replace(table, plan_trade_offs=planned)
