"""The callback that prunes a model in the middle of a fit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_prune.architectures.registry import has_groups
from lit_prune.arguments import BATCHES, COUNT, FLAG, PATH, RATIO, TEXT, optional
from lit_prune.budgets.budget import Budget
from lit_prune.callbacks.calibration import check_calibration_loader
from lit_prune.callbacks.cutting import finish_stage, prune_stage, put_off
from lit_prune.callbacks.detection import model_in
from lit_prune.callbacks.fit_checks import check_fit
from lit_prune.callbacks.ranks import on_all_ranks, ranks_of
from lit_prune.callbacks.resuming import budget_reached, check_goes_on, schedule_state, stages_behind
from lit_prune.callbacks.runs import PruningRun, Runs
from lit_prune.callbacks.schedule import (
    CubicSchedule,
    Stage,
    begin_epoch_anew,
    check_reachable,
    check_timing,
    due_stage,
    skips_epoch_start,
    stages_of,
)
from lit_prune.callbacks.strategies import check_strategy, follow_checkpoints, stop_rebuilding
from lit_prune.config import PruningConfig
from lit_prune.errors import UnsupportedModelError
from lit_prune.plan import FORMAT, PruningPlan
from lit_prune.ranking.selection import Limits, mlp_multiples
from lit_prune.ranking.table import GroupTable


class StructuredPruning(Callback):
    r"""Prune the model for real in the middle of ``fit``, at once or gradually, and let the same run fine-tune it.

    At the start of the scheduled epoch (or before the batch of the scheduled step) the callback runs calibration batches
    through the module's own ``training_step`` without an optimizer step, ranks every attention group and MLP channel of
    the model in one global table by importance / cost, cuts the lowest until ``pruning_ratio`` is reached, and carries
    the optimizer's state over. Calibration has no side effects: random numbers, dropout, the dataloader's position,
    logged metrics, gradients and ``global_step`` are as if it had not happened.

    ``trainer.validate`` prunes, too, without any training, if epoch or step is 0: what it measures is the pruned model.

    Every checkpoint written later carries the plan beside the weights, in every save mode (``save_weights_only=True``
    among them), and ``ckpt_path=`` rebuilds the smaller model from it before weights load. A run may be resumed with another
    schedule: what is gone counts towards its ratios, and the stages that ask for more prune on. A checkpoint written just
    after the cut (on an error, for instance) carries the plan, too; the resumed run then does what was left to be done.

    One callback may be used for several fits. A fit with a model that it has not seen (the next fold, the next run of a
    sweep) prunes that one from the beginning; a fit with one that it has pruned trains it on. The attributes below are of
    the model given last.

    Another callback may define ``on_pruning_start(trainer, pl_module, pruning)``, called with the dense model before
    calibration, and ``on_pruning_end(trainer, pl_module, pruning)``, called after the cut; ``pruning`` is this callback.
    ``on_pruning_load_start(trainer, pl_module, pruning, checkpoint)`` and ``on_pruning_load_end`` (the same arguments) are
    called before and after the model is cut as a checkpoint needs it, before weights and optimizer state load;
    ``on_optimizers_renewed(trainer, pl_module, pruning)`` after a callback of :mod:`lit_prune.callbacks.distillation` made new
    optimizers. ``on_pruning_due(trainer, pl_module, pruning, stage)`` puts a stage off if it returns True, see
    :class:`LearnedGates`.

    Callbacks that hold parameters or a copy of the model and define none of these are refused; Lightning's
    ``WeightAveraging`` is pruned together with the model. ``ModelCheckpoint``, ``EarlyStopping`` and
    ``ReduceLROnPlateau`` forget their best score at the cut, so that a dense model does not win over the pruned ones.

    Args:
        importance: Name of the criterion, see :func:`lit_prune.criteria`; a mix of several, ``{name: weight}``; or
            ``"auto"``, which chooses between several by the loss on held-back calibration batches.
        pruning_ratio: Fraction of parameters to remove, strictly between 0 and 1.
        epoch: Prune at the start of this epoch (0 is the first). The default, with no ``step`` and ``schedule``, is 1.
        step: Prune before the first batch after this many optimizer steps, in place of ``epoch``.
        schedule: Prune gradually, in place of ``epoch`` and ``step``: a list of :class:`Stage`, the last of which says the
            ratio in place of ``pruning_ratio``, or a :class:`CubicSchedule` that leads to ``pruning_ratio``. Every stage
            calibrates anew, and their plans compose into one against the model that the run began with.
        calibration_batches: Number of calibration batches.
        calibration_dataloader: Where they come from; the train dataloader if ``None``. Its batches must suit
            ``training_step``.
        ratio_of: Whether the ratio is of ``"all"`` parameters of the model or of the ``"prunable"`` ones.
        normalize: Normalisation of the importance before the global ranking: ``"mean"``, ``None`` for raw sums, or
            ``"default"`` for the criterion's own.
        statistics: How gradients are gathered: ``"streaming"`` keeps a number a group where the criterion allows it,
            ``"elementwise"`` keeps whole tensors in CPU memory.
        gradient_dtype: What gradients are accumulated in where the criterion needs them element by element (``taylor``):
            ``"float32"``, or ``"bfloat16"`` for half the memory.
        offload_gradients: Accumulate those in CPU memory, copied there while the device computes on.
        repair: How the projections that read removed groups are corrected: ``"least_squares"`` refits them on the
            calibration batches, ``"bias"`` folds the mean of the removed features into their biases, ``None`` leaves them.
        offload_hidden_states: Hold those of all batches in CPU memory for that; ``None`` lets it depend on their size.
        min_groups: Smallest number of groups to keep in every attention module and every MLP.
        min_fraction: Smallest fraction of the groups to keep in every attention module and every MLP.
        protect: Layers that stay whole: indices (negative ones count from the end) or regular expressions searched in
            module names.
        uniform: Keep the same widths in every layer, so that the result fits a stock config of transformers or LitGPT.
        mlp_multiple_of: Keep MLP widths at multiples of this number; ``None`` for the largest of 64, 32, 16 and 8 of
            which a width has 48 or more (32 for 1536 channels), and any width below: rounded ones multiply faster.
        kinds: The kinds of groups that may be removed: ``"attention"``, ``"mlp"``, and ``"block"`` for whole decoder
            layers, ``"hidden"`` for channels of the hidden states; ``None`` allows all but those two.
        model_path: Where the model is inside the LightningModule, if that holds several.
        dry_run: Compute table and plan, and cut nothing.
        validate: Run the trainer's validation loop just before and just after the cut; what it measures is in
            ``metrics["dense"]`` and ``metrics["pruned"]``.
        output_dir: Where to write ``plan.json`` and ``group_table.csv``; nothing is written if ``None``. A folder that cannot
            be written to is refused before training; if writing fails later, there is a warning and the run goes on.
        seed: Seed of ``importance="random"``.
        compensation: Whether importance takes the repair ``"least_squares"`` into account; what it needs is
            recorded in calibration if there is memory for it, else in one more run of all decoder layers in each iteration.
        iterations: Number of equal cuts in which each stage reaches its ratio. Each is calibrated, ranked and repaired
            on the same batches, and costs as much. ``None`` for as few as remove 0.2 each at most, and two for a budget.
        recalibrate_batch_norm: Estimate the running statistics of batch norms behind what is removed anew on the calibration
            batches after every cut.
        polish_epochs: Number of passes over the calibration batches in which, after the last cut of a stage, the layers that a
            repair refits are trained towards the outputs that the model gave before the stage; 0 trains nothing.
        quality: ``"fast"`` or ``"best"`` in place of compensation and polish, see :class:`lit_prune.PruningConfig`.
        budget: What the pruned model may take at most, in place of ``pruning_ratio``: a :class:`lit_prune.Budget`, or text
            like ``"latency=1.5x,memory=6GB"``.
        rotate_hidden: Turn hidden states to their principal directions before each cut; see :class:`lit_prune.PruningConfig`.

    Attributes:
        plan: The plan for the model that the run began with, once it was pruned (or planned for, with ``dry_run``).
        table: The group table of the last stage.
        stages: The schedule.
        stages_done: How many of its stages are done.
        metrics: What validation measured, by ``"dense"`` (before the first cut) and ``"pruned"`` (after the last one); empty
            if the fit has nothing to validate.
        runs: State of the run of every model that the callback was given.
        costs: What each phase of the last stage took, its iterations together, and all of them (``"total"``):
            ``"PHASE_seconds"``, and ``"PHASE_peak_bytes"``, the highest use of memory so far when it ended, see
            :class:`lit_prune.costs.PhaseCost`. The phases are named in :func:`lit_prune.pipeline.prune_with`.

    Raises:
        ArgumentTypeError: If an argument is of another type. Scalars of numpy and torch count as numbers.
        ArgumentValueError: If an argument is unknown or out of its range.

    Example::

        from lit_prune.callbacks import StructuredPruning

        trainer = L.Trainer(max_epochs=3, callbacks=[StructuredPruning("taylor_2nd", pruning_ratio=0.2, epoch=1)])
        trainer.fit(my_module, my_datamodule)
    """

    def __init__(
        self,
        importance: str | Mapping[str, float] = PruningConfig.importance,
        pruning_ratio: float = PruningConfig.pruning_ratio,
        epoch: int | None = None,
        step: int | None = None,
        schedule: list[Stage] | CubicSchedule | None = None,
        calibration_batches: int = 64,
        calibration_dataloader: Iterable[Any] | None = None,
        ratio_of: Literal["all", "prunable"] = PruningConfig.ratio_of,
        normalize: str | None = PruningConfig.normalize,
        statistics: Literal["streaming", "elementwise"] = PruningConfig.statistics,
        gradient_dtype: Literal["float32", "bfloat16"] = PruningConfig.gradient_dtype,
        offload_gradients: bool = PruningConfig.offload_gradients,
        repair: Literal["least_squares", "bias"] | None = PruningConfig.repair,
        offload_hidden_states: bool | None = PruningConfig.offload_hidden_states,
        min_groups: int = Limits.min_groups,
        min_fraction: float = Limits.min_fraction,
        protect: Sequence[int | str] = Limits.protect,
        mlp_multiple_of: int | None = None,
        uniform: bool = Limits.uniform,
        kinds: Sequence[str] | None = Limits.kinds,
        model_path: str | None = None,
        dry_run: bool = False,
        validate: bool = True,
        output_dir: str | Path | None = None,
        seed: int = PruningConfig.seed,
        compensation: bool = PruningConfig.compensation,
        iterations: int | None = PruningConfig.iterations,
        recalibrate_batch_norm: bool = PruningConfig.recalibrate_batch_norm,
        polish_epochs: int = PruningConfig.polish_epochs,
        quality: Literal["fast", "best"] | None = None,
        budget: Budget | str | None = None,
        rotate_hidden: bool = PruningConfig.rotate_hidden,
    ) -> None:
        super().__init__()
        check_timing(schedule, epoch, step, budget)
        pruning_ratio = RATIO.check("pruning_ratio", pruning_ratio)
        self.stages = stages_of(schedule, pruning_ratio, epoch, step)
        self.calibration_batches = COUNT.check("calibration_batches", calibration_batches)
        self.calibration_dataloader = optional(BATCHES).check("calibration_dataloader", calibration_dataloader)
        check_calibration_loader(calibration_dataloader)
        self.config = PruningConfig(
            importance=importance,
            pruning_ratio=self.stages[-1].ratio,
            ratio_of=ratio_of,
            normalize=normalize,
            statistics=statistics,
            gradient_dtype=gradient_dtype,
            offload_gradients=offload_gradients,
            offload_hidden_states=offload_hidden_states,
            limits=Limits(
                min_groups=min_groups,
                min_fraction=min_fraction,
                protect=protect,
                multiple_of=mlp_multiples(mlp_multiple_of),
                kinds=kinds,
                uniform=uniform,
            ),
            repair=repair,
            seed=seed,
            compensation=compensation,
            iterations=iterations,
            recalibrate_batch_norm=recalibrate_batch_norm,
            polish_epochs=polish_epochs,
            quality=quality,
            budget=budget,
            rotate_hidden=rotate_hidden,
        )
        self.model_path = optional(TEXT).check("model_path", model_path)
        self.dry_run = FLAG.check("dry_run", dry_run)
        self.validate = FLAG.check("validate", validate)
        self.output_dir = optional(PATH).check("output_dir", output_dir)
        self.costs: dict[str, float] = {}
        self.runs = Runs()

    @property
    def plan(self) -> PruningPlan | None:
        """The plan from the model that the run began with to the model as it is."""
        return self.runs.current.plan

    @property
    def table(self) -> GroupTable | None:
        """The group table of the last stage; ``None`` in a run that was resumed after it."""
        return self.runs.current.table

    @property
    def stages_done(self) -> int:
        """How many stages of the schedule are done."""
        return self.runs.current.stages_done

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Validation metrics of the model before the first cut (``"dense"``) and after the last one (``"pruned"``)."""
        return {stage: dict(values) for stage, values in self.runs.current.metrics.items()}

    def model(self, pl_module: pl.LightningModule) -> torch.nn.Module:
        """The model inside the LightningModule that is pruned.

        That is the one at ``model_path``; without it the one that a description covers, or, where none does, the part that
        holds all weights that are trained, or else the LightningModule as a whole.
        """
        return model_in(pl_module, self.model_path)[1]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the strategy, begin or continue the run of this model, and apply a checkpoint's plan before it loads.

        Raises:
            UnsupportedStrategyError: If the strategy keeps the parameters in a way that cannot be cut.
        """
        check_strategy(trainer.strategy)
        # a group of processes is made by all of them at the same point
        ranks_of(trainer)
        follow_checkpoints(trainer, self)
        model = None
        if stage == "fit":
            # configure_model may make it later; on_fit_start raises if it does not
            with contextlib.suppress(UnsupportedModelError):
                found = self.model(pl_module)
                model = found if has_groups(found) or any(True for _ in found.parameters()) else None
        self.runs.begin(model)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Undo :meth:`setup`."""
        del pl_module, stage
        stop_rebuilding(trainer)

    @on_all_ranks("the checks before training")
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the model, the budget and the output folder before any work is done."""
        self.runs.bind(self.model(pl_module), self.config.limits)
        if self.stages_done < len(self.stages):
            check_fit(self, trainer, pl_module)

    @on_all_ranks("the checks before training")
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that every stage can come; in a resumed fit, do what its checkpoint left to be done.

        Raises:
            ValueError: If the fit ends before a stage.
        """
        # a sharded model is loaded after on_fit_start
        self.runs.bind(self.model(pl_module), self.config.limits)
        check_reachable(trainer, pl_module, self.stages[self.stages_done :])
        begin_epoch_anew(trainer)
        if self.runs.current.unfinished:
            self._finish(trainer, pl_module)
        if skips_epoch_start(trainer):
            self._prune_if_due(trainer, pl_module, epoch=trainer.current_epoch)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune if a stage is due at this epoch."""
        self._prune_if_due(trainer, pl_module, epoch=trainer.current_epoch)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prune if a stage is due at this step, or was at this epoch."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._prune_if_due(trainer, pl_module, epoch=trainer.current_epoch, step=trainer.global_step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune under ``trainer.validate``, without any training, if a stage is due at epoch or step 0."""
        if trainer.state.fn == TrainerFn.VALIDATING and any(0 in (s.epoch, s.step) for s in self.stages):
            with torch.inference_mode(False), torch.enable_grad():
                self.on_fit_start(trainer, pl_module)
                self._prune_if_due(trainer, pl_module, epoch=0, step=0)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if the run ended before the whole schedule was done."""
        self.notify(trainer, pl_module, "on_pruning_schedule_end")
        if self.stages_done < len(self.stages):
            rank_zero_warn(
                f"StructuredPruning was scheduled for {self.stages[self.stages_done]}, but training ended after epoch"
                f" {trainer.current_epoch} and step {trainer.global_step}: {self.stages_done} of {len(self.stages)} stages"
                " were done."
            )

    @on_all_ranks("what comes after a cut")
    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        finish_stage(self, trainer, pl_module)

    def _prune_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule, **now: int) -> None:
        stage = due_stage(self.stages, self.stages_done, **now)
        if stage is not None and not put_off(self, trainer, pl_module, stage):
            self.prune(trainer, pl_module, stage)

    @on_all_ranks("pruning")
    def prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: int = -1) -> None:
        """Calibrate, plan and, unless it is a dry run, cut; called by the schedule.

        Args:
            trainer: The trainer, in the middle of a fit.
            pl_module: The module that holds the model.
            stage: Index of the stage of the schedule.

        Raises:
            CalibrationError: If calibration met a loss or gradient that is not finite, or no data.
            BudgetError: If the ratio cannot be reached.
            UnsupportedCallbackError: If another callback holds parts of the model that would be stale.
        """
        prune_stage(self, trainer, pl_module, stage % len(self.stages))

    def stage_config(self, stage: int = -1) -> PruningConfig:
        """The configuration of a stage of the schedule: its ratio, of the model that the run began with."""
        return replace(self.config, pruning_ratio=self.stages[stage].ratio, reference=self.runs.current.reference)

    def notify(self, trainer: pl.Trainer, pl_module: pl.LightningModule, hook: str, *arguments: Any) -> None:
        """Call a hook around pruning on every callback that defines it."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if callable(function := getattr(callback, hook, None)):
                function(trainer, pl_module, self, *arguments)

    # every checkpoint has it, those of weights alone too: see callbacks/strategies.py
    state_beside_weights = True

    def state_dict(self) -> dict[str, Any]:
        """The plan, how far the schedule has come, and the metrics, as plain data."""
        run = self.runs.current
        if self.dry_run:
            run = replace(run, plan=None, stages_done=0, unfinished=False)
        schedule = schedule_state(self.stages, self.config.ratio_of, run.reached, self.config.budget)
        path = run.path if self.model_path is None else self.model_path
        return {"format": FORMAT, "model_path": path, **run.state_dict(), **schedule}

    @property
    def state_key(self) -> str:
        """Tells the states of several pruning callbacks, each for a model of its own, apart."""
        return super().state_key if self.model_path is None else self._generate_state_key(model_path=self.model_path)

    def check_resumable(self, trainer: pl.Trainer, state_dict: Mapping[str, Any]) -> None:
        """Refuse, before anything is changed, to go on from a checkpoint whose model has lost more than is asked for.

        Raises:
            PlanError: If it has.
        """
        if trainer.state.fn == TrainerFn.FITTING:
            check_goes_on(self.stages, self.config.ratio_of, state_dict, self.config.budget)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the plan and the metrics of a checkpoint; of the schedule, what is not done yet goes on.

        The schedule may be another than that of the run which wrote the checkpoint: stages that ask for no more than is gone
        are done, and the others prune on, against the model that the first run began with.
        """
        done = stages_behind(self.stages, self.config.ratio_of, state_dict)
        run = PruningRun.from_state_dict(state_dict)
        self.runs.load(replace(run, stages_done=done, reached=budget_reached(state_dict)))
