"""A learning-rate warm-up after every cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from lit_prune.arguments import (
    COUNT,
    FRACTION,
)
from lit_prune.callbacks.pruning import StructuredPruning
from lit_prune.callbacks.renewal import _any_cut
from lit_prune.callbacks.runs import PerModule


def _nothing() -> None:
    return None


class LearningRateRewarmup(Callback):
    r"""Warm up the learning rate again after every cut, on top of the run's own scheduler.

    At the k-th optimizer step after a cut every learning rate is multiplied by
    :math:`f + (1 - f)\,\min(1, k / \mathrm{steps})`, for the length of this step only: the scheduler, and whoever reads
    ``param_groups`` between steps (``LearningRateMonitor``), see the learning rate of the schedule.

    Args:
        steps: Optimizer steps until the whole learning rate is reached again.
        start_factor: The factor f, from 0 to 1.

    Raises:
        ArgumentTypeError: If an argument is of another type.
        ArgumentValueError: If one is out of its range.

    Example::

        Trainer(callbacks=[StructuredPruning(), LearningRateRewarmup(steps=200)])
    """

    def __init__(self, steps: int = 100, start_factor: float = 0.0) -> None:
        super().__init__()
        self.steps = COUNT.check("steps", steps)
        self.start_factor = FRACTION.check("start_factor", start_factor)
        self._since_cut: PerModule[list[int] | None] = PerModule(_nothing)
        self._hooked: list[Optimizer] = []
        self._handles: list[Any] = []
        self._warmed: list[_Warmed] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the state kept for this module, and release the optimizers of a fit that ended in an error."""
        del trainer, stage
        self._release()
        self._since_cut.begin(pl_module)

    def factor(self, step: int) -> float:
        """The factor of the learning rate at the given step after the cut; the first step is 1."""
        return self.start_factor + (1 - self.start_factor) * min(1.0, step / self.steps)

    def on_pruning_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, pruning: StructuredPruning) -> None:
        """Start over."""
        del pl_module
        if not pruning.dry_run:
            self._since_cut.value = [0] * len(trainer.optimizers)
            self._take_hold(trainer.optimizers)

    def on_optimizers_renewed(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, pruning: StructuredPruning
    ) -> None:
        """Warm up the new optimizers that another callback made."""
        del pl_module, pruning
        self._take_hold(trainer.optimizers)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Continue the warm-up of a resumed run."""
        del pl_module
        if not _any_cut(trainer):
            self._since_cut.reset()
        self._take_hold(trainer.optimizers)

    def _take_hold(self, optimizers: Sequence[Optimizer]) -> None:
        if self._since_cut.value is None or [id(o) for o in optimizers] == [id(o) for o in self._hooked]:
            return
        self._release()
        self._hooked = list(optimizers)
        for number, optimizer in enumerate(optimizers):
            warmed = _Warmed(self, number, optimizer)
            self._warmed.append(warmed)
            self._handles.append(optimizer.register_step_pre_hook(warmed.before))
            self._handles.append(optimizer.register_step_post_hook(warmed.after))

    def _release(self) -> None:
        self._end_steps()
        for handle in self._handles:
            handle.remove()
        self._handles, self._hooked, self._warmed = [], [], []

    def _end_steps(self) -> None:
        for warmed in self._warmed:
            warmed.end()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Give the learning rates of the schedule back if an error ended a step that the module went on after."""
        del trainer, pl_module, batch, batch_idx
        self._end_steps()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the learning rates of the schedule back if the error came within a step: checkpoints are written now."""
        del trainer, pl_module, exception
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the optimizers."""
        del trainer, pl_module, stage
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """How many steps ago the cut was, by optimizer."""
        since = self._since_cut.value
        return {"since_cut": None if since is None else list(since)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore how many steps ago the last cut was."""
        since = state_dict["since_cut"]
        self._since_cut.value = None if since is None else list(since)


class _Warmed:
    """The step hooks of one optimizer.

    Lightning computes the loss within the step, so that whatever goes wrong there ends the step without its second hook.
    """

    def __init__(self, owner: LearningRateRewarmup, number: int, optimizer: Optimizer) -> None:
        self._owner = owner
        self._number = number
        self._optimizer = optimizer
        self._rates: list[Any] = []
        # an optimizer whose step calls that of its base class runs the hooks of both
        self._depth = 0

    def before(self, optimizer: Optimizer, *_: Any) -> None:
        self._depth += 1
        if self._depth == 1:
            assert self._owner._since_cut.value is not None
            factor = self._owner.factor(self._owner._since_cut.value[self._number] + 1)
            self._rates = [group["lr"] for group in optimizer.param_groups]
            if factor < 1:
                for group in optimizer.param_groups:
                    group["lr"] = group["lr"] * factor

    def after(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            assert self._owner._since_cut.value is not None
            self._owner._since_cut.value[self._number] += 1
            self._restore()

    def end(self) -> None:
        """Put the learning rates back if a step was begun and not ended."""
        if self._depth:
            self._depth = 0
            self._restore()

    def _restore(self) -> None:
        # groups that were added within the step have the rate that they came with
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=False):
            group["lr"] = rate
