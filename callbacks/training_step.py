"""Running the user's ``training_step`` on calibration batches, with what Lightning runs around it."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lit_prune.calibration.evaluation import only_trained, unobserved
from lit_prune.calibration.statistics import SKIPPED
from lit_prune.callbacks.lightning_internals import (
    IteratorFetcher,
    call_module_hook,
    last_fetched,
    step_arguments,
    transferred,
)
from lit_prune.callbacks.manual_optimization import RecordedOptimization
from lit_prune.callbacks.packages import is_a
from lit_prune.callbacks.write_guard import WriteGuard
from lit_prune.distributed import shards


class TrainingStep:
    """Runs the module's ``training_step`` on calibration batches and gives its loss, without training anything.

    Around the step the module's own hooks are run as Lightning runs them in an epoch: ``on_train_epoch_start`` (unless it
    was run already), the transfer of the batch, ``on_train_batch_start``, and ``on_train_batch_end`` after the backward
    pass. Hooks around backward pass and optimizer step are not run, as there is no such step; neither are hooks of other
    callbacks. What the step does to optimizers itself is recorded, see :class:`RecordedOptimization`.

    The step is called on the LightningModule itself, past any wrapper of the strategy, so that gradients stay local. In
    float16 they are scaled on their way, as in training, so that small ones do not vanish.

    Args:
        trainer: The trainer.
        model: The model that is calibrated, inside the LightningModule.
        guard: Puts weights back that the step or a hook writes into.
    """

    def __init__(self, trainer: pl.Trainer, model: nn.Module, guard: WriteGuard) -> None:
        self._trainer = trainer
        self._module = trainer.lightning_module
        self._model = model
        self._guard = guard
        self._optimization = RecordedOptimization(trainer, model, guard)
        self._scale = gradient_scale(trainer)
        # of the batch that was run last, and by the identity of all that were given out
        self._number = 0
        self._numbers: dict[int, int] = {}
        self._autocast = True
        # the outputs of a step whose batch has not ended yet
        self._outputs: Mapping[str, Any] | None = None
        self._fetcher: IteratorFetcher | None = None

    def batches(self, loader: CombinedLoader, limit: int, progress: Callable[[], object]) -> Iterator[Any]:
        """The batches of a loader, on the device, as the step expects them.

        Args:
            loader: The loader.
            limit: Number of batches at most.
            progress: Called after every batch.
        """
        self._start_epoch()
        if is_param_in_hook_signature(self._module.training_step, "dataloader_iter", explicit=True):
            iterator: Iterator[Any] = self._iterators(loader)
        else:
            iterator = (transferred(self._trainer, batch) for batch, *_ in loader)
        for number in range(limit):
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._number = self._numbers[id(batch)] = number
            yield batch
            self._end_batch(batch)
            progress()

    def without_autocast(self) -> None:
        """Let the calls from now on compute in the precision of the weights, also where training casts operators."""
        self._autocast = False

    def __call__(self, batch: Any) -> Any:
        """The loss of a batch; one that runs again has the same number.

        :data:`lit_prune.calibration.statistics.SKIPPED` if the module skips it, or nothing in it trains the model.
        """
        self._number = self._numbers.get(id(batch), self._number)
        try:
            with self._guard.watching(), self._optimization.active(), self._gradients():
                # as in Lightning, which warns
                output = None if batch is None else self._run(batch)
        except BaseException as error:
            # also where a step exits or is interrupted, the weights are as before
            self._optimization.forget()
            self._guard.restore()
            if isinstance(error, Exception) and hasattr(error, "add_note"):
                error.add_note(
                    f"This was raised in a step of {type(self._module).__name__} while StructuredPruning calibrated (batch"
                    f" {self._number}). The module is in eval mode there; backward passes, optimizer and scheduler steps do"
                    " nothing, and parameters have no gradients. Code that needs them can ask for self.training."
                )
            raise
        loss = loss_of(output)
        if not self._module.automatic_optimization and self._optimization.called:
            # what is returned is for others to see: this is what trains
            loss = self._optimization.loss()
        elif loss is None and output is not None and self._module.automatic_optimization:
            # Lightning refuses this; so does who asked for a loss
            return output
        self._optimization.forget()
        if loss is None:
            return SKIPPED
        if isinstance(loss, Tensor) and not torch.is_grad_enabled():
            loss = loss.detach()
        return _ScaledGradient.apply(loss, self._scale) if self._scale != 1 and isinstance(loss, Tensor) else loss

    @contextlib.contextmanager
    def _gradients(self) -> Iterator[None]:
        """Let the step differentiate by inputs and other networks, also where nobody asks for gradients of the model."""
        if torch.is_grad_enabled() or shards.any_sharded(self._model.parameters()) is not None:
            yield
            return
        # what needs no gradients of the model builds no graph
        with only_trained(self._model), torch.enable_grad():
            yield

    def _run(self, batch: Any) -> Any:
        fetcher = self._fetcher
        shown, number = (batch, self._number) if fetcher is None else last_fetched(fetcher)
        with unobserved():
            response = call_module_hook(self._trainer, "on_train_batch_start", shown, number)
        # Lightning ends the epoch here; calibration goes on to the next batch
        if response == -1:
            return None
        arguments = step_arguments(self._trainer, batch, self._number)
        if fetcher is not None:
            arguments = OrderedDict(any=batch)
        plugin = self._trainer.precision_plugin
        plain = is_a(plugin, MixedPrecision) and not self._autocast
        with contextlib.nullcontext() if plain else plugin.train_step_context():
            try:
                output = self._module.training_step(*arguments.values())
            except StopIteration:
                if fetcher is None:
                    raise
                # it asked for one batch more than there are
                fetcher.done = True
                return None
        self._outputs = self._as_outputs(output)
        return output

    def _as_outputs(self, output: Any) -> dict[str, Any]:
        """What Lightning gives to ``on_train_batch_end``."""
        loss = loss_of(output)
        outputs = dict(output) if isinstance(output, Mapping) else {}
        if isinstance(loss, Tensor):
            share = self._trainer.accumulate_grad_batches if self._module.automatic_optimization else 1
            outputs["loss"] = (loss.detach() / share).clone()
        return outputs

    def _end_batch(self, batch: Any) -> None:
        try:
            if self._outputs is not None:
                fetcher = self._fetcher
                shown, number = (batch, self._number) if fetcher is None else last_fetched(fetcher)
                with self._guard.watching(), self._optimization.active(), unobserved():
                    call_module_hook(self._trainer, "on_train_batch_end", self._outputs, shown, number)
        finally:
            self._outputs = None
            self._optimization.forget()
            self._guard.restore()

    def _start_epoch(self) -> None:
        if self._trainer.state.fn != TrainerFn.FITTING:
            hooks = ["on_fit_start", "on_train_start", "on_train_epoch_start"]
        else:
            progress: Any = self._trainer.fit_loop.epoch_progress.current
            # callbacks come before the module: at the start of an epoch its hook has yet to run
            hooks = ["on_train_epoch_start"] if progress.started < progress.ready else []
        with self._guard.watching(), self._optimization.active(), unobserved():
            for hook in hooks:
                call_module_hook(self._trainer, hook)
        self._optimization.forget()
        self._guard.restore()

    def _iterators(self, loader: CombinedLoader) -> Iterator[Any]:
        """The same iterator again and again, for as long as it has batches: the step takes as many as it wants."""
        self._fetcher = IteratorFetcher()
        self._fetcher.setup(loader)
        iter(self._fetcher)
        while not self._fetcher.done:
            yield next(self._fetcher)


def loss_of(output: Any) -> Any:
    """The loss in what a training step returned: itself, or its ``"loss"`` entry or attribute."""
    if isinstance(output, Mapping):
        return output.get("loss")
    return output if output is None or isinstance(output, Tensor) else getattr(output, "loss", output)


class _ScaledGradient(torch.autograd.Function):
    """The identity, with a gradient that is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None


def gradient_scale(trainer: pl.Trainer) -> float:
    """What gradients are multiplied by on their way through activations of float16; 1 with other precisions.

    A sixteenth of what the scaler of the training has come to: that one skips a step now and then because a gradient was
    not finite, and calibration skips none.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    # the gradients that FSDP2 reduces pass no hook of a parameter
    if scaler is None or not scaler.is_enabled() or is_a(trainer.strategy, ModelParallelStrategy):
        return 1.0
    return max(1.0, float(scaler.get_scale()) / 16)


def named_loaders(prefix: str, loaders: Any) -> Iterable[tuple[str, Any]]:
    """Dataloaders, single or in any nesting, with names for messages."""
    if loaders is not None:
        flat = CombinedLoader(loaders, "sequential").flattened
        yield from ((prefix if len(flat) == 1 else f"{prefix}[{n}]", loader) for n, loader in enumerate(flat))
