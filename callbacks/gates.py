"""Learning by gates, in the run itself, what to remove."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_prune.architectures.registry import find_group_sets, has_groups
from lit_prune.arguments import FLAG
from lit_prune.calibration.agreement import Agreement
from lit_prune.calibration.divergence import mixed_loss
from lit_prune.calibration.evaluation import evaluation_mode
from lit_prune.calibration.gates import Gates
from lit_prune.calibration.random_state import random_state_kept
from lit_prune.callbacks.calibration import uncompiled
from lit_prune.callbacks.cutting import _batches
from lit_prune.callbacks.detection import find_groups
from lit_prune.callbacks.manual_optimization import held_step, replaced
from lit_prune.callbacks.packages import is_a
from lit_prune.callbacks.progress import progress_over
from lit_prune.callbacks.pruning import StructuredPruning
from lit_prune.callbacks.ranks import on_all_ranks, ranks_of
from lit_prune.callbacks.renewal import _pruning_callbacks
from lit_prune.callbacks.runs import PerModule
from lit_prune.config import AUTO
from lit_prune.errors import ArgumentValueError, CalibrationError, PruningError, UnsupportedStrategyError
from lit_prune.gating import GateOptions, GateTraining, first_table
from lit_prune.progress import Progress
from lit_prune.ranking.model_table import group_table
from lit_prune.torch_internals import mark_as_stepped


@dataclass(frozen=True)
class _Phase:
    """How far the learning for a stage has come.

    Args:
        stage: Index of the stage in the schedule; ``None`` before the first.
        state: State of the training of the gates, while it goes on.
        random: State of torch's random numbers when it began: the calibration batches depend on it.
        importance: What was learned, once it is over.
    """

    stage: int | None = None
    state: Mapping[str, Any] | None = None
    random: Tensor | None = None
    importance: tuple[Tensor, ...] | None = None


class LearnedGates(Callback):
    """Learn, in the steps before a cut, what :class:`StructuredPruning` is to remove.

    When a stage of the schedule is due, the next ``steps`` optimizer steps of the fit learn a gate for every group in place
    of the weights, and the cut comes after them. In each of these steps ``training_step`` runs with the groups removed that
    have the lowest scores, as many as the budget asks for, and the scores move by the derivative of its loss by every gate
    (:mod:`lit_prune.ranking.gate_scores`). Scores begin with the importance of StructuredPruning's criterion. What is left at
    the end is cut in one iteration, and repaired.

    Weights and the state of optimizers stay as they are meanwhile, bit for bit; the module is in evaluation mode, ``global_step``
    and learning rate schedules go on. Validation is that of the whole model. Checkpoints hold the scores, and a resumed run
    goes on from there. ``gate_steps``, ``gate_loss`` (the loss with the groups removed) and ``gates_changed`` (the fraction of
    what the criterion would have removed that is kept now) are logged.

    If the fit ends before all steps were done, there is a warning, and what was learned so far is cut.

    Args:
        steps: Optimizer steps to learn in, of every stage.
        distillation: Share of the divergence from the whole model's outputs in the loss, the rest being the module's own.
            Its gradient is less noisy; it needs a model whose outputs have ``logits``, and one more forward pass a batch.
        reconstruct: Whether what is removed is predicted from what stays meanwhile, as the repair ``"least_squares"`` will do.
            Holds two matrices of ``features ** 2`` numbers for each layer that reads groups.
        horizon: Steps that the averages of derivatives look back; ``None`` for half of ``steps``, 10 at least.
        refresh: Steps after which the predictions are made anew.
        train_weights: Train the weights as well, in training mode, as without this callback. Needs ``reconstruct=False``.

    Raises:
        ArgumentTypeError: If an argument is of another type.
        ArgumentValueError: If one is out of its range, or two do not go together.

    Example::

        Trainer(callbacks=[StructuredPruning(pruning_ratio=0.2, step=500), LearnedGates(steps=200)])

    Reference: the projection on the budget in every step and the frozen weights are those of GRASPrune (ACL 2026, arXiv
    2604.19398); prior and noise take the place of its optimizer.
    """

    def __init__(
        self,
        steps: int = GateOptions.steps,
        distillation: float = GateOptions.distillation,
        reconstruct: bool = GateOptions.reconstruct,
        horizon: int | None = GateOptions.horizon,
        refresh: int = GateOptions.refresh,
        train_weights: bool = False,
    ) -> None:
        super().__init__()
        self.options = GateOptions(steps, distillation, reconstruct, horizon, refresh)
        self.train_weights = FLAG.check("train_weights", train_weights)
        if self.train_weights and self.options.reconstruct:
            raise ArgumentValueError(
                "What is removed is predicted from what the weights gave at the beginning, so they have to stay: with"
                " train_weights=True give reconstruct=False."
            )
        self._phase: PerModule[_Phase] = PerModule(_Phase)
        self._training: GateTraining | None = None
        # what holds for the phase, and for the batch at hand
        self._stack, self._batch = ExitStack(), ExitStack()
        self._entered = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that the fit is one whose steps gates can be learned in.

        Raises:
            PruningError: If the module optimizes by hand, or there is not one StructuredPruning.
            UnsupportedStrategyError: Under ``ModelParallelStrategy``.
        """
        # an error ends a fit without teardown
        self._close()
        self._phase.begin(pl_module)
        if stage != "fit":
            return
        if is_a(trainer.strategy, ModelParallelStrategy):
            raise UnsupportedStrategyError(
                "LearnedGates is not supported under ModelParallelStrategy (FSDP2). Use DDP or one device, or rank by the"
                " criterion alone."
            )
        if not pl_module.automatic_optimization:
            raise PruningError(
                f"LearnedGates takes the place of the optimizer's step, and {type(pl_module).__name__} optimizes by hand"
                " (automatic_optimization=False). Use lit_prune.learn_gates before the fit."
            )
        found = _pruning_callbacks(trainer)
        if len(found) != 1:
            raise PruningError(
                f"LearnedGates learns what a StructuredPruning callback removes; expected one of them, found {len(found)}."
            )
        if found[0].config.importance == AUTO:
            raise ArgumentValueError(
                "LearnedGates begins with the importance of one criterion; found importance='auto'. Name one, fisher for"
                " instance."
            )
        if found[0].config.limits.hidden:
            raise ArgumentValueError("LearnedGates has no gates for hidden channels; expected no kind 'hidden'.")
        if found[0].config.budget is not None:
            raise ArgumentValueError(
                "LearnedGates learns under a number of parameters; expected a pruning_ratio, found"
                f" budget={found[0].config.budget}."
            )

    @on_all_ranks("the checks before training")
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that all groups can have gates.

        Raises:
            UnsupportedModelError: If there are groups whose consumers cannot be observed.
        """
        for pruning in _pruning_callbacks(trainer):
            model = pruning.model(pl_module)
            if has_groups(model) and pruning.stages_done < len(pruning.stages):
                Gates(model, find_group_sets(model, blocks=pruning.config.limits.blocks))

    def on_pruning_due(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, pruning: StructuredPruning, stage: int
    ) -> bool:
        """Return whether a stage that is due has to wait for its gates; begin to learn them if it is new.

        Raises:
            PruningError: Under ``trainer.validate``, which has no steps to learn in.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            raise PruningError(
                "LearnedGates learns in the steps of a fit, and trainer.validate has none. Leave it out, or use"
                " lit_prune.learn_gates and lit_prune.prune."
            )
        phase = self._phase.value
        if phase.stage == stage and phase.importance is not None:
            return False
        if self._training is None or phase.stage != stage:
            self._close()
            self._begin(trainer, pl_module, pruning, stage)
            # the batch at hand, whose start may have been passed
            self._enter(pl_module)
        return True

    def pruning_importance(self, pruning: StructuredPruning, stage: int) -> list[Tensor] | None:
        """Return what was learned for a stage, ``None`` if nothing was."""
        del pruning
        phase = self._phase.value
        return None if phase.stage != stage or phase.importance is None else list(phase.importance)

    def _begin(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, pruning: StructuredPruning, stage: int
    ) -> None:
        find_groups(pruning, trainer, pl_module)
        model, config, ranks = pruning.model(pl_module), pruning.stage_config(stage), ranks_of(trainer)
        group_sets = find_group_sets(model, blocks=config.limits.blocks)

        def data(_: str) -> Any:
            return _batches(pruning, trainer, Progress(lambda _: [], None))

        before = self._phase.value
        resumed = before.state if before.stage == stage else None
        random = torch.get_rng_state() if resumed is None else before.random
        assert random is not None
        with random_state_kept():
            # in a resumed run, for the batches that the interrupted one was calibrated on
            torch.set_rng_state(random)
            if resumed is None:
                bar = progress_over(trainer, "Blocks")
                table = first_table(model, data, config, root=pl_module, ranks=ranks, progress=bar)
            else:
                prior = resumed["scores"]["prior"].split([s.size for s in group_sets])
                table = group_table(model, group_sets, prior)
            training = GateTraining(
                model, group_sets, table, config.budget_of_parameters(model, group_sets), config, self.options
            )
            if resumed is not None:
                training.load_state_dict(dict(resumed))
            training.observe(data, pl_module, ranks, resumed=resumed is not None)
        self._phase.value = _Phase(stage, training.state_dict(), random)
        self._attach(trainer, pl_module, training)
        rank_zero_info(
            f"Learning gates in {self.options.steps - training.scores.steps} steps from here, for a cut of"
            f" {training.scores.removed:,} parameters."
        )

    def _attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule, training: GateTraining) -> None:
        self._training = training
        with ExitStack() as stack:
            stack.enter_context(training.gates)
            if self.options.distillation:
                agreement = stack.enter_context(Agreement(training.model, training.gates))
                stack.enter_context(
                    replaced(pl_module, "training_step", self._with_divergence(pl_module.training_step, agreement))
                )
            if not self.train_weights:
                for optimizer in trainer.optimizers:
                    mark_as_stepped(optimizer)
                    stack.enter_context(replaced(optimizer, "step", held_step(optimizer.step)))
            self._stack = stack.pop_all()

    def _with_divergence(self, own: Callable[..., Any], agreement: Agreement) -> Callable[..., Any]:
        @functools.wraps(own)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            # those of a step before that returned None
            agreement.forget()
            output = own(*args, **kwargs)
            if output is None or not self._entered:
                return output
            loss = output["loss"] if isinstance(output, Mapping) else output
            total = mixed_loss(loss, agreement.take(), self.options.distillation)
            return {**output, "loss": total} if isinstance(output, Mapping) else total

        return training_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Open the gates for a batch."""
        del trainer, batch, batch_idx
        if self._training is not None:
            self._enter(pl_module)

    def _enter(self, pl_module: pl.LightningModule) -> None:
        if self._entered or self._training is None:
            return
        with ExitStack() as stack:
            if not self.train_weights:
                stack.enter_context(evaluation_mode(pl_module))
            stack.enter_context(uncompiled())
            stack.enter_context(self._training.gates.open())
            self._batch = stack.pop_all()
        self._entered = True

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the derivatives by the gates of a batch."""
        del pl_module
        if self._entered and self._training is not None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            scale = 1.0 if scaler is None else float(scaler.get_scale())
            self._training.accumulate(scale / trainer.accumulate_grad_batches)

    @on_all_ranks("learning gates")
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Move the scores, in place of the weights.

        Raises:
            CalibrationError: If a derivative is not finite, where no scaler of losses tries again with a smaller scale.
        """
        del pl_module, optimizer
        if not self._entered or self._training is None:
            return
        if not self._training.step(ranks_of(trainer)) and getattr(trainer.precision_plugin, "scaler", None) is None:
            raise CalibrationError(
                f"A derivative of the loss by a gate is not finite in step {trainer.global_step}. Nothing was pruned."
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log how far it has come, and end it after its last step."""
        del batch, batch_idx
        if self._training is None:
            return
        self._leave()
        values: dict[str, Any] = {
            "gate_steps": float(self._training.scores.steps),
            "gates_changed": self._training.scores.changed,
        }
        if isinstance(outputs, Mapping) and isinstance(outputs.get("loss"), Tensor):
            values["gate_loss"] = outputs["loss"].detach() * trainer.accumulate_grad_batches
        pl_module.log_dict(values)
        if self._training.done:
            self._finish()

    def _leave(self) -> None:
        self._entered = False
        self._batch.close()

    def _finish(self) -> None:
        assert self._training is not None
        scores = self._training.scores
        rank_zero_info(f"Gates were learned in {scores.steps} steps, {scores.changed:.1%} of what is removed changed.")
        importance = tuple(scores.importance())
        self._close()
        self._phase.value = replace(self._phase.value, state=None, importance=importance)

    def on_pruning_schedule_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, pruning: StructuredPruning
    ) -> None:
        """Cut by what was learned so far if the fit ends before all steps were done."""
        phase = self._phase.value
        if phase.stage is None or pruning.stages_done > phase.stage:
            return
        if self._training is not None:
            self._leave()
            rank_zero_warn(
                f"The fit ended after {self._training.scores.steps} of the {self.options.steps} steps in which LearnedGates"
                " learns; the model is cut by what was learned so far."
            )
            self._finish()
        pruning.prune(trainer, pl_module, phase.stage)

    def on_pruning_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, pruning: StructuredPruning) -> None:
        """Begin anew with the next stage."""
        del trainer, pl_module, pruning
        self._phase.value = _Phase()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the gates if the module ended the epoch before a batch."""
        del trainer, pl_module
        self._leave()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave module and optimizers as they were: checkpoints are written now."""
        del trainer, pl_module, exception
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave module and optimizers as they were."""
        del trainer, pl_module, stage
        self._close()

    def _close(self) -> None:
        self._leave()
        self._stack.close()
        if self._training is not None:
            self._phase.value = replace(self._phase.value, state=self._training.state_dict())
            self._training = None

    def state_dict(self) -> dict[str, Any]:
        """How far the learning has come, as plain data and tensors."""
        phase = self._phase.value
        state = phase.state if self._training is None else self._training.state_dict()
        importance = None if phase.importance is None else list(phase.importance)
        return {"stage": phase.stage, "training": state, "random": phase.random, "importance": importance}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        importance = state_dict["importance"]
        self._phase.value = _Phase(
            state_dict["stage"],
            state_dict["training"],
            state_dict["random"],
            None if importance is None else tuple(importance),
        )
