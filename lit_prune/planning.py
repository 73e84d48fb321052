"""From statistics to a plan: every group is scored, all are ranked, and the lowest leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lit_prune.budgets.goals import Goals
from lit_prune.calibration.statistics import Statistics
from lit_prune.config import DEFAULT, PruningConfig
from lit_prune.distributed import shards
from lit_prune.errors import (
    ArgumentTypeError,
    ArgumentValueError,
)
from lit_prune.groups import GroupSet, check_names, count_parameters, count_removed
from lit_prune.plan import ROTATED_ATTRIBUTE, PruningPlan
from lit_prune.ranking.budget_selection import select_for_budgets
from lit_prune.ranking.importance import group_importance, mixed_importance
from lit_prune.ranking.model_table import group_table, original_sizes, select_in_model
from lit_prune.ranking.registry import get_criterion
from lit_prune.ranking.table import GroupTable
from lit_prune.surgery.kept_groups import with_kept_groups


def make_plan(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    statistics: Statistics | None,
    config: PruningConfig,
    *,
    measure: Callable[[PruningPlan], float] | None = None,
    goals: Goals | None = None,
    learned: Sequence[Tensor] | None = None,
) -> tuple[GroupTable, PruningPlan]:
    """Score, rank and select the groups; gives the global table and the plan.

    Args:
        model: The model.
        group_sets: Its group sets.
        statistics: What :func:`lit_prune.calibrate` collected; may be ``None`` for a criterion that needs nothing.
        config: The configuration.
        measure: What a plan costs, its masked loss for instance (:func:`lit_prune.ranking.candidates.masked_loss`); asked
            only where there are several candidates.
        goals: What ``config.goals`` found of the model before any cut, if the configuration has a budget; found of this model
            if ``None``.
        learned: Importance of the groups of every set that was learned (:func:`lit_prune.learn_gates`), in place of the
            criterion's.

    Raises:
        BudgetError: If the ratio or budget cannot be reached under the limits.
        CalibrationError: If an importance is not finite.
        UnsupportedModelError: If the group sets are of another model.
        ValueError: If there are several candidates and no ``measure``.
    """
    shards.reshard(model)
    check_names(model, group_sets)
    goals = goals or config.goals(model, group_sets)
    if learned is not None:
        label = f"gates from {config.importance}"
        return _ranked(model, group_sets, learned, config, goals, statistics, label, {}, learned=True)
    parameters: Mapping[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    results: list[tuple[GroupTable, PruningPlan]] = []
    measured: dict[str, float] = {}
    if len(config.candidates) > 1 and measure is None:
        raise ArgumentValueError(
            f"importance={config.importance!r} chooses between plans and needs a measure of them; found None."
        )
    for label, weights in config.candidates.items():
        parts = []
        for name, weight in weights.items():
            criterion = get_criterion(name)
            normalize = criterion.normalize if config.normalize == DEFAULT else config.normalize
            importance = group_importance(
                criterion, parameters, group_sets, statistics, normalize=normalize, seed=config.seed
            )
            parts.append((weight, importance))
        total = parts[0][1] if len(parts) == 1 else mixed_importance(parts, group_sets)
        if statistics is not None and statistics.unexplained:
            total = _discounted(total, group_sets, statistics.unexplained)
        results.append(_ranked(model, group_sets, total, config, goals, statistics, label, weights))
        if measure is not None and len(config.candidates) > 1:
            measured[label] = measure(results[-1][1])
    if not measured:
        return results[0]
    best = min(measured, key=measured.__getitem__)
    table, plan = results[list(measured).index(best)]
    return table, replace(plan, info={**plan.info, "candidates": measured})


def check_learned(group_sets: Sequence[GroupSet], importance: Sequence[Tensor] | None) -> None:
    """Check importance that was learned against the groups that it is of.

    Raises:
        ArgumentTypeError: If it is no sequence of tensors.
        ArgumentValueError: If it is of other groups.
    """
    if importance is None:
        return
    if isinstance(importance, (str, Tensor)) or not all(isinstance(part, Tensor) for part in importance):
        raise ArgumentTypeError(
            f"importance must be a tensor for each group set, as learn_gates gives it; found {importance!r}."
        )
    found, expected = [tuple(part.shape) for part in importance], [(s.size,) for s in group_sets]
    if found != expected:
        raise ArgumentValueError(
            f"importance must have a number for each group of the {len(expected)} group sets that the limits allow; expected"
            f" shapes {expected}, found {found}. Hidden channels cannot be learned."
        )


def _select(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    table: GroupTable,
    config: PruningConfig,
    goals: Goals | None,
) -> dict[str, Any]:
    """Mark in the table which groups stay, and say for the plan's info what was asked for and is reached."""
    if goals is None:
        select_in_model(model, group_sets, table, config.budget_of_parameters(model, group_sets), config.limits)
        return {"pruning_ratio": config.pruning_ratio, "ratio_of": config.ratio_of}
    resources, multiple = config.resources(model, group_sets, goals)
    choice = select_for_budgets(table, resources, config.limits, original_sizes(model), multiple)
    table.kept, table.price = choice.kept, choice.price
    return {
        "budget": {name: str(asked) for name, asked in goals.budget.asked.items()},
        "budget_share": config.budget_share,
        "binding": list(choice.binding),
        "predicted": choice.values,
    }


def _ranked(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    importance: Sequence[Tensor],
    config: PruningConfig,
    goals: Goals | None,
    statistics: Statistics | None,
    label: str,
    weights: Mapping[str, float],
    *,
    learned: bool = False,
) -> tuple[GroupTable, PruningPlan]:
    """The table of an importance, the groups selected in it, and the plan."""
    table = group_table(model, group_sets, importance)
    before = count_parameters(model)
    reached = _select(model, group_sets, table, config, goals)
    removed = count_removed(model, group_sets, table.removed_groups())
    # nobody says what an importance that was learned elsewhere was measured on
    batches = None if learned else 0 if statistics is None else statistics.batches
    info = {
        "importance": label,
        "weights": dict(weights),
        "normalize": config.normalize,
        "repair": config.repair,
        **reached,
        **({"calibration_batches": batches} if batches is not None else {}),
        **({"skipped_batches": statistics.skipped} if statistics is not None and statistics.skipped else {}),
        "parameters_before": before,
        "parameters_after": before - removed,
    }
    made = with_kept_groups(model, PruningPlan.from_kept(group_sets, table.kept_groups(), info))
    return table, replace(made, rotated=getattr(model, ROTATED_ATTRIBUTE, False))


def _discounted(
    importance: Sequence[Tensor], group_sets: Sequence[GroupSet], unexplained: Mapping[tuple[str, str], Tensor]
) -> list[Tensor]:
    """Importance times the square root of the shares, which measured better than the shares themselves."""
    return [
        i * unexplained[s.key].sqrt().to(i) if s.key in unexplained else i
        for i, s in zip(importance, group_sets, strict=True)
    ]
