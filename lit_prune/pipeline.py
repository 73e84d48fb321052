"""From statistics to a plan in one call: what the callback, the command line and a notebook share."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_prune._moved import moved_names
from lit_prune.architectures import find_group_sets, find_model
from lit_prune.architectures.registry import has_groups
from lit_prune.architectures.weight_checks import check_parameters
from lit_prune.arguments import BATCHES
from lit_prune.calibration.collect import collect_statistics
from lit_prune.calibration.module_checks import check_computation
from lit_prune.calibration.statistics import Statistics
from lit_prune.config import DEFAULT, PruningConfig
from lit_prune.detection import check_traceable, find_or_trace
from lit_prune.distributed import shards
from lit_prune.distributed.ranks import Ranks, together
from lit_prune.errors import (
    ArgumentValueError,
    SmallBudgetError,
    UnsupportedModelError,
)
from lit_prune.group_data import keep_group_sets
from lit_prune.groups import GroupSet, check_names, count_parameters
from lit_prune.plan import PruningPlan
from lit_prune.ranking.candidates import masked_loss
from lit_prune.ranking.importance import group_importance, mixed_importance
from lit_prune.ranking.model_table import group_table, select_in_model
from lit_prune.ranking.registry import get_criterion
from lit_prune.ranking.table import GroupTable
from lit_prune.repair.bias import bias_fold
from lit_prune.repair.redundancy import unexplained_shares
from lit_prune.repair.refit import least_squares
from lit_prune.surgery.apply import check_holders, cut
from lit_prune.surgery.kept_groups import with_kept_groups
from lit_prune.surgery.plan_cuts import touched_parameters
from lit_prune.surgery.references import suspended_hooks

__getattr__ = moved_names("lit_prune.pipeline")


def calibrate(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    batches: Iterable[Any],
    loss_fn: Callable[[Any], Tensor | None],
    config: PruningConfig,
    *,
    root: nn.Module | None = None,
    ranks: Ranks | None = None,
) -> Statistics:
    """Collect what the configured criterion needs; see :func:`lit_prune.calibration.collect.collect_statistics`.

    Hooks of the parameters (``register_hook``, ``register_post_accumulate_grad_hook``) are not called meanwhile.

    Raises:
        UnsupportedModelError: If weights are not in memory, or tied to a module beside the model.
    """
    check_parameters(model, group_sets, root)
    with suspended_hooks(model if root is None else root):
        return _collect(model, group_sets, batches, loss_fn, config, root, ranks)


def _collect(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    batches: Iterable[Any],
    loss_fn: Callable[[Any], Tensor | None],
    config: PruningConfig,
    root: nn.Module | None,
    ranks: Ranks | None,
) -> Statistics:
    return collect_statistics(
        model,
        group_sets,
        (batch for number, batch in enumerate(batches) if not config.holds_back(number)),
        loss_fn,
        config.terms,
        mode=config.statistics,
        activations=config.repair == "bias",
        gradient_dtype=config.gradient_dtype,
        offload_gradients=config.offload_gradients,
        root=root,
        ranks=ranks,
    )


def make_plan(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    statistics: Statistics | None,
    config: PruningConfig,
    *,
    measure: Callable[[PruningPlan], float] | None = None,
) -> tuple[GroupTable, PruningPlan]:
    """Score, rank and select: the global table with the rows that stay, and the plan that says the same.

    Args:
        model: The model.
        group_sets: Its group sets.
        statistics: What :func:`calibrate` collected; may be ``None`` for a criterion that needs nothing.
        config: The configuration.
        measure: What a plan costs, its masked loss for instance (:func:`masked_loss`); asked only where there are
            several candidates.

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
        plan = with_kept_groups(model, PruningPlan.from_kept(group_sets, table.kept_groups(), info))
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


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[Any], Tensor | None],
    config: PruningConfig,
    optimizers: Iterable[Optimizer] = (),
) -> tuple[GroupTable, PruningPlan]:
    """Calibrate, plan, repair and cut, as often as ``config.iterations`` says: the whole way in one call.

    Cutting little by little is better than all at once on the same calibration batches: what is important, and what can
    make up for it, is measured again once the rest is gone. An error leaves model and optimizers as they were.

    The groups of a module that no description covers are found by running the first batch (see :func:`lit_prune.trace`).

    Args:
        model: The model, or a module that holds one; cut in place.
        batches: Calibration batches; iterated several times, so not an iterator.
        loss_fn: Runs one batch through the model and returns its loss.
        config: The configuration.
        optimizers: Optimizers over the model's parameters, cut along.

    Returns:
        The group table of the model as it was, and the plan for it. A group's importance is that of the last iteration that
        ranked it.

    Raises:
        ArgumentError: If the batches are an iterator, which can be read only once.
        BudgetError: If the ratio cannot be reached under the limits, before any work is done.
        CalibrationError: If calibration met a loss or gradient that is not finite, or no data.
        TypeError: If the batches are an iterator.
        UnsupportedModelError: If nothing in the model can be pruned.

    Example::

        table, plan = lit_prune.prune(model, batches, lambda b: model(**b).loss, PruningConfig(pruning_ratio=0.2))
    """
    batches = BATCHES.check("batches", batches)
    if config.limits.blocks and not has_groups(model):
        check_traceable(model, blocks=True)
    if (found := find_or_trace(model, batches, loss_fn)) is not None:
        keep_group_sets(model, found)
    inner = find_model(model)[1]
    return prune_with(inner, lambda _: contextlib.nullcontext((batches, loss_fn)), config, optimizers, root=model)


CHECK, CALIBRATION, COMPENSATION, COMPARISON, REPAIR = "check", "calibration", "compensation", "comparison", "repair"


Data = Callable[[str], contextlib.AbstractContextManager[tuple[Iterable[Any], Callable[[Any], Tensor | None]]]]


def prune_with(
    model: nn.Module,
    data: Data,
    config: PruningConfig,
    optimizers: Iterable[Optimizer] = (),
    *,
    root: nn.Module | None = None,
    ranks: Ranks | None = None,
    agree: Callable[[PruningPlan], None] = lambda plan: None,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
    record: Callable[[GroupTable, PruningPlan], None] = lambda table, plan: None,
    dry_run: bool = False,
) -> tuple[GroupTable, PruningPlan]:
    """What :func:`prune` does, for callers that have to prepare something every time that batches are run.

    Args:
        model: The model itself.
        data: Called with what the batches are for, ``"check"`` (one batch, see
            :func:`lit_prune.calibration.module_checks.check_computation`), ``"calibration"``, ``"compensation"`` (what a
            repair could make up for), ``"comparison"`` (of candidates) or ``"repair"``; gives a context in which they are
            run, with the batches, the same ones every time, and the loss function.
        config: The configuration.
        optimizers: Optimizers over the model's parameters, cut along.
        root: The module that holds the model, if there is more to a forward pass than the model.
        ranks: The processes of a distributed run.
        agree: Called with every plan before it is carried out; raises if another process has a different one.
        progress: Wraps the sequence of blocks that are repaired.
        record: Called with the result right after the last cut; if it raises, all cuts are undone.
        dry_run: Plan, in one iteration, and cut nothing.
    """
    total = None if ranks is None else ranks.sum
    optimizers = list(optimizers)
    blocks = config.limits.blocks
    group_sets = find_group_sets(model, blocks=blocks)
    config.check(model, group_sets)
    check_parameters(model, group_sets, root)
    if not dry_run:
        touched = touched_parameters(model, group_sets, config.limits.kinds)
        biases = config.repair == "bias"
        check_holders(model, model if root is None else root, list(optimizers), touched, adds_biases=biases)
    with data(CHECK) as (batches, loss), together(ranks, "calibration"):
        check_computation(model, group_sets, batches, loss, root=root, ranks=ranks, kinds=config.limits.kinds)
    steps = config.steps(model, group_sets)
    undos: list[Callable[[], None]] = []
    table: GroupTable | None = None
    made: PruningPlan | None = None
    try:
        for number, step in enumerate(steps[-1:] if dry_run else steps):
            group_sets = find_group_sets(model, blocks=blocks)
            try:
                step.check(model, group_sets)
            except SmallBudgetError:
                if made is None and step is steps[-1]:
                    raise
                continue
            # the hooks that preparing the data registers are called
            with suspended_hooks(model if root is None else root), data(CALIBRATION) as (batches, loss):
                with together(ranks, "calibration"):
                    statistics = _collect(model, group_sets, batches, loss, step, root, ranks)

            if step.compensates:
                with data(COMPENSATION) as (batches, loss):
                    statistics.unexplained = _unexplained(model, group_sets, batches, loss, root, progress, ranks)

            def measure(
                candidate: PruningPlan, sets: Sequence[GroupSet] = group_sets, step: PruningConfig = step
            ) -> float:
                with data(COMPARISON) as (batches, loss):
                    value = masked_loss(model, sets, candidate, batches, loss, step.holds_back, root=root)
                return value if total is None else float(total(torch.tensor(value, dtype=torch.float64)))

            ranked, plan = make_plan(model, group_sets, statistics, step, measure=measure)
            table = ranked if table is None else table.then(ranked)
            agree(plan)
            if not dry_run:
                with data(REPAIR) as (batches, loss):
                    plan, weights = repair(
                        model,
                        group_sets,
                        plan,
                        statistics,
                        batches,
                        loss,
                        step,
                        root=root,
                        progress=progress,
                        ranks=ranks,
                    )
                # what another process could not cut is not cut here
                with together(ranks, "surgery"):
                    undos.append(cut(model, plan, optimizers, weights, root=root))
                del weights
            made = plan if made is None else _composed(made, plan, number + 1)
        assert table is not None
        assert made is not None
        with together(ranks, "taking over the result"):
            record(table, made)
    except BaseException:
        try:
            with together(ranks, "pruning"):
                raise
        finally:
            # where sharded parameters are gathered, those who did not meet the error are not there to undo anything with
            if ranks is None or ranks.mean_gradients or not ranks.lost:
                for undo in reversed(undos):
                    undo()
    return table, made


def _unexplained(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    root: nn.Module | None,
    progress: Callable[[Sequence[str]], Iterable[str]],
    ranks: Ranks | None,
) -> dict[tuple[str, str], Tensor]:
    total = None if ranks is None else ranks.sum
    try:
        with together(ranks, "measuring what repair can make up for"):
            return unexplained_shares(model, group_sets, batches, forward, root=root, progress=progress, total=total)
    except UnsupportedModelError:
        # such a model is not repaired either, of which repair warns
        return {}


def _composed(first: PruningPlan, later: PruningPlan, iterations: int) -> PruningPlan:
    plan = first.then(later)
    return replace(plan, info={**plan.info, "iterations": iterations})


def repair(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    plan: PruningPlan,
    statistics: Statistics,
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    config: PruningConfig,
    *,
    root: nn.Module | None = None,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
    ranks: Ranks | None = None,
) -> tuple[PruningPlan, dict[str, Tensor]]:
    """Compute new weights for the consumers of what leaves, as configured; the model is not changed.

    Args:
        model: The dense model.
        group_sets: Its group sets.
        plan: The plan.
        statistics: What calibration collected.
        batches: The calibration batches once more; read only by ``"least_squares"``.
        forward: Runs one batch through the model.
        config: The configuration.
        root: The module that holds the model, if ``forward`` runs more than the model.
        progress: Wraps the sequence of blocks.
        ranks: The processes of a distributed run, each with batches of its own.

    Returns:
        The plan, with biases that the repair adds, and the new weights, both for :func:`lit_prune.apply_plan`. A model
        whose blocks cannot be run one after the other gets a warning and no new weights.
    """
    if config.repair == "bias":
        return bias_fold(model, group_sets, plan, statistics)
    if config.repair == "least_squares":
        try:
            with together(ranks, "repair"):
                total = None if ranks is None else ranks.sum
                return plan, least_squares(
                    model, group_sets, plan, batches, forward, root=root, progress=progress, total=total
                )
        except UnsupportedModelError as error:
            warnings.warn(f"Nothing was repaired: {error}", stacklevel=2)
    return plan, {}
