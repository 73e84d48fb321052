"""From statistics to a plan: every group is scored, all are ranked, and the lowest leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from lit_prune.calibration.statistics import Statistics
from lit_prune.config import DEFAULT, PruningConfig
from lit_prune.distributed import shards
from lit_prune.errors import (
    ArgumentValueError,
)
from lit_prune.groups import GroupSet, check_names, count_parameters
from lit_prune.plan import ROTATED_ATTRIBUTE, PruningPlan
from lit_prune.ranking.importance import group_importance, mixed_importance
from lit_prune.ranking.model_table import group_table, select_in_model
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
) -> tuple[GroupTable, PruningPlan]:
    """Score, rank and select the groups; gives the global table and the plan.

    Args:
        model: The model.
        group_sets: Its group sets.
        statistics: What :func:`lit_prune.calibrate` collected; may be ``None`` for a criterion that needs nothing.
        config: The configuration.
        measure: What a plan costs, its masked loss for instance (:func:`lit_prune.ranking.candidates.masked_loss`); asked
            only where there are several candidates.

    Raises:
        BudgetError: If the ratio cannot be reached under the limits.
        CalibrationError: If an importance is not finite.
        UnsupportedModelError: If the group sets are of another model.
        ValueError: If there are several candidates and no ``measure``.
    """
    shards.reshard(model)
    check_names(model, group_sets)
    parameters: Mapping[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    before = count_parameters(model)
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
        table = group_table(model, group_sets, total)
        removed = select_in_model(model, group_sets, table, config.budget(model, group_sets), config.limits)
        info = {
            "importance": label,
            "weights": dict(weights),
            "normalize": config.normalize,
            "repair": config.repair,
            "pruning_ratio": config.pruning_ratio,
            "ratio_of": config.ratio_of,
            "calibration_batches": statistics.batches if statistics is not None else 0,
            **({"skipped_batches": statistics.skipped} if statistics is not None and statistics.skipped else {}),
            "parameters_before": before,
            "parameters_after": before - removed,
        }
        made = PruningPlan.from_kept(group_sets, table.kept_groups(), info)
        plan = replace(with_kept_groups(model, made), rotated=getattr(model, ROTATED_ATTRIBUTE, False))
        results.append((table, plan))
        if measure is not None and len(config.candidates) > 1:
            measured[label] = measure(plan)
    if not measured:
        return results[0]
    best = min(measured, key=measured.__getitem__)
    table, plan = results[list(measured).index(best)]
    return table, replace(plan, info={**plan.info, "candidates": measured})


def _discounted(
    importance: Sequence[Tensor], group_sets: Sequence[GroupSet], unexplained: Mapping[tuple[str, str], Tensor]
) -> list[Tensor]:
    """Importance times the square root of the shares, which measured better than the shares themselves."""
    return [
        i * unexplained[s.key].sqrt().to(i) if s.key in unexplained else i
        for i, s in zip(importance, group_sets, strict=True)
    ]
