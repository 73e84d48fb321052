"""From statistics to a plan in one call: what the callback, the command line and a notebook share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_prune._moved import moved_names
from lit_prune.architectures import find_group_sets, find_model
from lit_prune.architectures.registry import has_groups
from lit_prune.architectures.weight_checks import check_parameters
from lit_prune.arguments import BATCHES
from lit_prune.budgeting import correct_goals, find_goals, with_measured, with_trade_offs
from lit_prune.budgets.goals import Goals
from lit_prune.calibration.collect import collect_statistics
from lit_prune.calibration.module_checks import check_computation
from lit_prune.calibration.random_state import same_random_numbers
from lit_prune.calibration.statistics import Statistics
from lit_prune.config import PruningConfig
from lit_prune.costs import Costs
from lit_prune.detection import check_traceable, find_or_trace
from lit_prune.distributed import shards
from lit_prune.distributed.ranks import Ranks, together
from lit_prune.distributed.shards import check_layout
from lit_prune.errors import SmallBudgetError, UnsupportedStrategyError
from lit_prune.group_data import keep_group_sets
from lit_prune.groups import GroupSet
from lit_prune.phases import (
    CALIBRATION,
    CHECK,
    COMPARISON,
    COMPENSATION,
    PLANNING,
    POLISH,
    RECALIBRATION,
    REPAIR,
    ROTATION,
    SURGERY,
    expected_work,
)
from lit_prune.plan import PruningPlan, get_plan, set_plan
from lit_prune.planning import check_learned, make_plan
from lit_prune.polishing import Polishing
from lit_prune.progress import Progress, Work, terminal_bar
from lit_prune.ranking.candidates import masked_loss
from lit_prune.ranking.table import GroupTable
from lit_prune.repair.batch_norm import batch_norms, recalibrate_batch_norms
from lit_prune.repair.recording import Recording
from lit_prune.repair.rotation import apply_rotation, find_rotation
from lit_prune.repairing import completed, recording_of, repaired, unexplained
from lit_prune.surgery.apply import check_holders, cut
from lit_prune.surgery.plan_cuts import touched_parameters
from lit_prune.surgery.references import suspended_hooks
from lit_prune.surgery.undoing import undo_all
from lit_prune.torch_internals import uncompiled

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
    recorder: Recording | None = None,
) -> Statistics:
    return collect_statistics(
        model,
        group_sets,
        config.not_held_back(batches),
        loss_fn,
        config.terms,
        mode=config.statistics,
        activations=config.repair == "bias",
        gradient_dtype=config.gradient_dtype,
        offload_gradients=config.offload_gradients,
        root=root,
        ranks=ranks,
        recorder=recorder,
    )


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[Any], Tensor | None],
    config: PruningConfig,
    optimizers: Iterable[Optimizer] = (),
    *,
    progress: bool = False,
    importance: Sequence[Tensor] | None = None,
) -> tuple[GroupTable, PruningPlan]:
    """Prune a model: calibrate, plan, repair and cut, in ``config.iterations`` cuts.

    Several smaller cuts give better models than one, because importance is measured again after each. An error leaves
    model and optimizers as they were.

    The groups of a module that no description covers are found by running the first batch (see :func:`lit_prune.trace`).

    Args:
        model: The model, or a module that holds one; cut in place.
        batches: Calibration batches; iterated several times, so not an iterator. The global random numbers are the same every
            time, so that a loader may shuffle by them; one with a generator of its own that shuffles has to be a list first.
        loss_fn: Runs one batch through the model and returns its loss.
        config: The configuration.
        optimizers: Optimizers over the model's parameters; their state is pruned, too.
        progress: Show a bar over all phases with the time left, if the standard error is a terminal.
        importance: Importance of the groups of every set that was learned (:func:`lit_prune.learn_gates`), in place of the
            criterion's. It is that of one set of groups to be removed together, so that there is one iteration.

    Returns:
        The group table of the model before the first cut, and the plan for that model. A group's importance is that of
        the last iteration that ranked it.

    Raises:
        ArgumentError: If the batches are an iterator, which can be read only once.
        BudgetError: If the ratio cannot be reached under the limits, before any work is done.
        CalibrationError: If calibration met a loss or gradient that is not finite, or no data, or if a model that is polished
            sees other batches than before.
        TypeError: If the batches are an iterator.
        UnsupportedModelError: If nothing in the model can be pruned.

    Example::

        table, plan = lit_prune.prune(model, batches, lambda b: model(**b).loss, PruningConfig(pruning_ratio=0.2))
    """
    batches = BATCHES.check("batches", batches)
    eager = uncompiled(model)
    if config.limits.blocks and not has_groups(eager):
        check_traceable(eager, blocks=True)
    # a compiled module would compile what observes it
    with torch.compiler.set_stance("force_eager"):
        if (found := find_or_trace(eager, batches, loss_fn)) is not None:
            keep_group_sets(eager, found)
        inner = find_model(model)[1]

        def work(count: int) -> Sequence[Work]:
            limits = config.limits
            sets = find_group_sets(inner, blocks=limits.blocks, hidden=limits.hidden)
            return expected_work(inner, sets, config, count)

        with Progress(work, terminal_bar if progress else None) as bar:
            if progress and (count := length_hint(batches)):
                bar.known(count)
            return prune_with(
                inner,
                same_random_numbers(lambda _: (bar.batches(batches) if progress else batches, loss_fn)),
                config,
                optimizers,
                root=model,
                progress=bar.layers,
                costs=Costs(bar.phase),
                learned=importance,
            )


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
    record: Callable[[GroupTable, PruningPlan], Callable[[], None] | None] = lambda table, plan: None,
    dry_run: bool = False,
    costs: Costs | None = None,
    learned: Sequence[Tensor] | None = None,
) -> tuple[GroupTable, PruningPlan]:
    """What :func:`prune` does, for callers that have to prepare something every time that batches are run.

    Args:
        model: The model itself.
        data: Called with what the batches are for, ``"check"`` (one batch, see
            :func:`lit_prune.calibration.module_checks.check_computation`), ``"calibration"``, ``"compensation"`` (what a
            repair could make up for), ``"comparison"`` (of candidates) or ``"repair"``; gives a context in which they are
            run, with the batches, the same ones every time, and the loss function. It may be called several times for
            ``"repair"`` and ``"polish"``, once with ``"recalibration"`` for batch norms, and with ``"rotation"`` for hidden
            states.
        config: The configuration.
        optimizers: Optimizers over the model's parameters; their state is pruned, too.
        root: The module that holds the model, if there is more to a forward pass than the model.
        ranks: The processes of a distributed run.
        agree: Called with every plan before it is carried out; raises if another process has a different one.
        progress: Wraps the sequence of blocks that are repaired.
        record: Called with the result right after the last cut; if it raises, all cuts are undone. It may return a function
            that undoes what it did, which is called if another process met an error meanwhile.
        dry_run: Plan, in one iteration, and cut nothing.
        costs: Takes what every phase takes: ``"check"``, ``"calibration"``, ``"compensation"``, ``"planning"`` (with the
            comparison of candidates), ``"repair"``, ``"surgery"``, in a model with batch norms ``"recalibration"``, and, where
            they are wanted, ``"rotation"`` and ``"polish"``.
        learned: Importance that was learned for the whole budget, in place of the criterion's; in one iteration.
    """
    all_reduce = None if ranks is None else ranks.sum
    optimizers = list(optimizers)
    find = partial(find_group_sets, model, blocks=config.limits.blocks, hidden=config.limits.hidden)
    group_sets = find()
    costs = Costs() if costs is None else costs
    phase = partial(costs.phase, device=next(model.parameters()).device)
    check_learned(group_sets, learned)
    with phase(CHECK):
        goals = _check_before(model, group_sets, data, config, optimizers, root, ranks, cuts=not dry_run)
    steps = config.steps(model, group_sets)
    undos: list[Callable[[], None]] = []
    epochs = 0 if dry_run else config.polish_epochs
    polishing = Polishing(model, partial(data, POLISH), epochs, config.holds_back, root=root, ranks=ranks)
    if epochs:
        with phase(POLISH):
            polishing.record_dense()
    table: GroupTable | None = None
    made: PruningPlan | None = None
    with _undone_at_error(undos, ranks):
        for number, step in enumerate(steps[-1:] if dry_run or learned is not None else steps):
            if step.rotate_hidden:
                with phase(ROTATION), together(ranks, "rotation"):
                    with data(ROTATION) as (batches, forward):
                        rotation = find_rotation(model, batches, forward, root=root, all_reduce=all_reduce)
                    undos.append(apply_rotation(model, rotation, optimizers, root=root))
            group_sets = find()
            try:
                step.check(model, group_sets, goals)
            except SmallBudgetError:
                if made is None and step is steps[-1]:
                    raise
                continue
            statistics = Statistics()
            # the hooks that preparing the data registers are called
            holder = model if root is None else root
            recording = None
            if learned is None or step.repair == "bias":
                recording = recording_of(model, group_sets, step, dry_run=dry_run)
                with phase(CALIBRATION):
                    with suspended_hooks(holder), data(CALIBRATION) as (batches, loss), together(ranks, "calibration"):
                        statistics = _collect(model, group_sets, batches, loss, step, root, ranks, recording)
                    recording = completed(recording, partial(data, CALIBRATION), step, holder, ranks)

            if step.compensates and learned is None:
                compensation = partial(data, COMPENSATION)
                with phase(COMPENSATION):
                    statistics.unexplained = unexplained(
                        model, group_sets, compensation, root, progress, ranks, recording, step.offload_hidden_states
                    )

            def measure(
                candidate: PruningPlan, sets: Sequence[GroupSet] = group_sets, step: PruningConfig = step
            ) -> float:
                with data(COMPARISON) as (batches, loss):
                    value = masked_loss(model, sets, candidate, batches, loss, step.holds_back, root=root)
                return value if all_reduce is None else float(all_reduce(torch.tensor(value, dtype=torch.float64)))

            with phase(PLANNING):
                if goals is not None and made is None and learned is None:
                    correct_goals(model, group_sets, statistics, config, goals)
                ranked, plan = make_plan(
                    model, group_sets, statistics, step, measure=measure, goals=goals, learned=learned
                )
                ranked = with_trade_offs(model, group_sets, ranked, step, goals) if made is None else ranked
            table = ranked if table is None else table.compose(ranked)
            agree(plan)
            if not dry_run:
                weights: dict[str, Tensor] = {}
                if step.repair is not None:
                    with phase(REPAIR):
                        plan, weights = repaired(
                            model,
                            group_sets,
                            plan,
                            statistics,
                            partial(data, REPAIR),
                            step,
                            root=root,
                            progress=progress,
                            ranks=ranks,
                            recording=recording,
                        )
                recording = None
                # what another process could not cut is not cut here
                with phase(SURGERY), together(ranks, "surgery"):
                    undos.append(cut(model, plan, optimizers, weights, root=root))
                del weights
                if step.recalibrate_batch_norm and batch_norms(model):
                    again = partial(data, RECALIBRATION)
                    with phase(RECALIBRATION), together(ranks, "recalibration"):
                        undos.append(
                            recalibrate_batch_norms(model, group_sets, plan, again, root=root, all_reduce=all_reduce)
                        )
            made = plan if made is None else _composed(made, plan, number + 1)
        assert table is not None
        assert made is not None
        if epochs:
            with phase(POLISH):
                info, undo = polishing.polish(find())
            undos.append(undo)
            made = replace(made, info={**made.info, **info})
            if (noted := get_plan(model)) is not None:
                set_plan(model, replace(noted, info={**noted.info, **info}))
        with phase(CHECK):
            made = with_measured(model, made, goals, cut=not dry_run)
        if dry_run:
            undo_all(undos)
        with together(ranks, "taking over the result"):
            if (forget := record(table, made)) is not None:
                undos.append(forget)
    return table, made


def _check_before(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    data: Data,
    config: PruningConfig,
    optimizers: Sequence[Optimizer],
    root: nn.Module | None,
    ranks: Ranks | None,
    *,
    cuts: bool,
) -> Goals | None:
    """Refuse, before any work is done, what could not be carried out later; return the goals of the budget, if there is one."""
    if config.limits.hidden and shards.any_sharded(model.parameters()) is not None:
        raise UnsupportedStrategyError(
            f"{type(model).__name__} is sharded by FSDP2, whose repair and rotation of hidden states are not there: leave"
            " 'hidden' out of the kinds, or prune before sharding."
        )
    goals = find_goals(model, group_sets, config, partial(data, CHECK), ranks)
    config.check(model, group_sets, goals)
    check_layout(model, group_sets)
    check_parameters(model, group_sets, root)
    if cuts:
        touched = touched_parameters(model, group_sets, config.limits.kinds)
        biases = config.repair == "bias"
        refitted = (
            [part.parameter for s in group_sets for part in s.repairable] if config.repair == "least_squares" else []
        )
        holder = model if root is None else root
        check_holders(model, holder, optimizers, touched, adds_biases=biases, repaired=refitted)
    with data(CHECK) as (batches, loss), together(ranks, "calibration"):
        check_computation(model, group_sets, batches, loss, root=root, ranks=ranks, kinds=config.limits.kinds)
    return goals


@contextlib.contextmanager
def _undone_at_error(undos: list[Callable[[], None]], ranks: Ranks | None) -> Iterator[None]:
    """Undo at an error, of whichever process, what was done so far, the last first."""
    try:
        yield
    except BaseException:
        try:
            with together(ranks, "pruning"):
                raise
        finally:
            # where sharded parameters are gathered, those who did not meet the error are not there to undo anything with
            if ranks is None or ranks.mean_gradients or not ranks.lost:
                undo_all(undos)


def _composed(first: PruningPlan, later: PruningPlan, iterations: int) -> PruningPlan:
    plan = first.compose(later)
    return replace(plan, info={**plan.info, "iterations": iterations})
