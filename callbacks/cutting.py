"""One stage of a pruning run inside a fit: calibration, the cut, and what follows it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor

from lit_prune.architectures.adaptations import nothing_to_undo
from lit_prune.callbacks.calibration import calibration
from lit_prune.callbacks.compatibility import (
    check_references,
    optimizers_of,
    prune_weight_averages,
    reset_best_scores,
    restart_averages,
)
from lit_prune.callbacks.detection import find_groups
from lit_prune.callbacks.output import warn_instead
from lit_prune.callbacks.progress import progress_of
from lit_prune.callbacks.protocol import Pruning
from lit_prune.callbacks.ranks import check_same_on_all_ranks, ranks_of
from lit_prune.callbacks.strategies import renew_wrapper
from lit_prune.callbacks.validation import missing_validation, validation_metrics
from lit_prune.costs import Costs, cost_rows
from lit_prune.io.lightning_checkpoint import plan_digest
from lit_prune.pipeline import prune_with
from lit_prune.plan import PruningPlan
from lit_prune.progress import Progress
from lit_prune.ranking.selection import parameter_budget
from lit_prune.ranking.table import GroupTable
from lit_prune.text_escape import one_line


def prune_stage(pruning: Pruning, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: int) -> None:
    """Calibrate, plan and, unless it is a dry run, cut; :meth:`StructuredPruning.prune` without its defaults."""
    find_groups(pruning, trainer, pl_module)
    model = pruning.model(pl_module)
    check_references(trainer, pl_module, model)
    pruning.notify(trainer, pl_module, "on_pruning_start")
    if pruning.stages_done == 0:
        _measure(pruning, trainer, "dense")
    pruning.costs.clear()
    config = pruning.stage_config(stage)
    with progress_of(trainer, model, config, dry_run=pruning.dry_run) as bar:
        costs = Costs(bar.phase)
        _, plan = prune_with(
            model,
            lambda _: _batches(pruning, trainer, bar),
            config,
            trainer.optimizers if trainer.state.fn == TrainerFn.FITTING else optimizers_of(trainer, pl_module),
            root=pl_module,
            ranks=ranks_of(trainer),
            agree=lambda plan: check_same_on_all_ranks(trainer, plan),
            progress=bar.layers,
            record=lambda table, plan: _record(pruning, trainer, model, stage, table, plan),
            dry_run=pruning.dry_run,
            costs=costs,
            learned=_learned(pruning, trainer, stage),
        )
    pruning.costs.update(costs.numbers())
    before, after = plan.info["parameters_before"], plan.info["parameters_after"]
    skipped = plan.info.get("skipped_batches", 0)
    rank_zero_info(
        f"{'Would remove' if pruning.dry_run else 'Removed'} {before - after:,} of {before:,} parameters"
        f" ({(before - after) / before:.2%}) by {one_line(plan.info['importance'])}."
        + (f" {skipped} calibration batches had no loss and were skipped." if skipped else "")
        + f" {_in_words(pruning.costs)}"
    )
    finish_stage(pruning, trainer, pl_module)


def put_off(pruning: Pruning, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: int) -> bool:
    """Whether a stage that is due has to wait, because another callback says so in ``on_pruning_due``."""
    hooks = [getattr(callback, "on_pruning_due", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    return any(hook(trainer, pl_module, pruning, stage) for hook in hooks if callable(hook))


def _learned(pruning: Pruning, trainer: pl.Trainer, stage: int) -> list[Tensor] | None:
    """The importance that another callback has for a stage, in ``pruning_importance``."""
    hooks = [getattr(callback, "pruning_importance", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    found = [hook(pruning, stage) for hook in hooks if callable(hook)]
    return next((importance for importance in found if importance is not None), None)


def _in_words(costs: Mapping[str, float]) -> str:
    *phases, total = cost_rows(costs)[1:]
    took = ", ".join(f"{name} {seconds}" for name, seconds, _ in phases)
    return f"It took {total[1]} s ({took}), with a peak of {total[2]} MB so far."


def _record(
    pruning: Pruning,
    trainer: pl.Trainer,
    model: torch.nn.Module,
    stage: int,
    table: GroupTable,
    plan: PruningPlan,
) -> Callable[[], None]:
    """Take over the result of a stage right after its cut, so that no checkpoint has the one without the other.

    Returns:
        A function that undoes this.
    """
    before, known = pruning.runs.current, pruning.plan
    reached = before.reached
    if not pruning.dry_run:
        assert before.reference is not None
        ratio, ratio_of = pruning.stages[stage].ratio, pruning.config.ratio_of
        if pruning.config.budget is not None:
            reached = max(reached, before.reference[0] - plan.info["parameters_after"])
        else:
            reached = max(reached, parameter_budget(ratio, ratio_of, *before.reference))
    run = replace(
        before.measured("pruned", {}),
        now=plan_digest(model),
        plan=plan if known is None or pruning.dry_run else known.compose(plan),
        table=table,
        stages_done=stage + 1,
        reached=reached,
        unfinished=True,
    )
    path = pruning.model_path or before.path
    undo_averages = nothing_to_undo if pruning.dry_run else prune_weight_averages(trainer, plan, path)
    forget = pruning.runs.commit(run)

    def undo() -> None:
        forget()
        undo_averages()

    return undo


def finish_stage(pruning: Pruning, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Do what comes after the cut. A run that was stopped in the middle of this does all of it when it is resumed."""
    if not pruning.dry_run:
        restart_averages(trainer, pl_module)
        reset_best_scores(trainer)
    renew_wrapper(trainer)
    _write(pruning)
    if not pruning.dry_run:
        _measure(pruning, trainer, "pruned")
    pruning.notify(trainer, pl_module, "on_pruning_end")
    pruning.runs.commit(replace(pruning.runs.current, unfinished=False))


def _measure(pruning: Pruning, trainer: pl.Trainer, stage: str) -> None:
    if pruning.validate and trainer.state.fn == TrainerFn.FITTING:
        metrics = validation_metrics(trainer)
        if not metrics:
            reason = missing_validation(trainer) or "validation_step logged none"
            rank_zero_info(f"No validation metrics of the {stage} model: {reason}.")
        pruning.runs.commit(pruning.runs.current.measured(stage, metrics))


@rank_zero_only
def _write(pruning: Pruning) -> None:
    folder = pruning.output_dir
    if folder is not None and pruning.plan is not None:
        with warn_instead(f"The plan and group table was not written to {folder}"):
            pruning.plan.save(folder / "plan.json")
            # a resumed run has no table of the stages before
            if pruning.table is not None:
                pruning.table.to_csv(folder / "group_table.csv")


@contextlib.contextmanager
def _batches(
    pruning: Pruning, trainer: pl.Trainer, bar: Progress
) -> Iterator[tuple[Iterator[Any], Callable[[Any], Any]]]:
    """The calibration batches and the loss on one; the same batches every time, as random numbers are put back."""
    model = pruning.model(trainer.lightning_module)
    with calibration(trainer, model, pruning.calibration_dataloader, pruning.calibration_batches, bar) as run:
        yield run
