"""Running calibration batches inside a fit, leaving no trace of it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import nn
from torch.utils.data import DataLoader

from lit_prune._moved import moved_names
from lit_prune.calibration.precision import scaled_loss
from lit_prune.calibration.random_state import random_state_kept
from lit_prune.callbacks.lightning_internals import (
    metrics_kept,
    prepared_train_dataloader,
    set_up_datamodule,
    train_data_source,
)
from lit_prune.callbacks.manual_optimization import nothing, replaced
from lit_prune.callbacks.packages import is_a
from lit_prune.callbacks.snapshot import Snapshot
from lit_prune.callbacks.stand_ins import InertCallback, SilentLogger
from lit_prune.callbacks.training_step import TrainingStep, gradient_scale, named_loaders
from lit_prune.callbacks.write_guard import WriteGuard
from lit_prune.distributed import shards
from lit_prune.errors import CalibrationError
from lit_prune.progress import Progress
from lit_prune.torch_internals import is_dynamo_loaded, new_iterator

__getattr__ = moved_names("lit_prune.callbacks.calibration")

_TRACES: weakref.WeakKeyDictionary[pl.Trainer, set[str]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def calibration(
    trainer: pl.Trainer,
    model: nn.Module,
    dataloader: Iterable[Any] | None,
    limit: int,
    progress: Progress | None = None,
) -> Iterator[tuple[Iterator[Any], TrainingStep]]:
    """Batches for calibration and the module's training step, to be run within this context without leaving a trace.

    The batches are on the device, as the step expects them, and the same ones every time. The train dataloaders are iterated
    by iterators of their own, so that the position of the running epoch stays.

    Args:
        trainer: The trainer, in the middle of a fit.
        model: The model that is calibrated, inside the LightningModule.
        dataloader: A dataloader for calibration, or ``None`` for the train dataloaders.
        limit: Number of batches at most.
        progress: A bar that the batches move.
    """
    module = trainer.lightning_module
    with contextlib.ExitStack() as stack:
        snapshot = stack.enter_context(untouched(trainer, dataloader))
        stack.enter_context(uncompiled())
        stack.enter_context(unscaled(trainer))
        stack.enter_context(silent_logging(module))
        if not trainer.optimizers and not module.automatic_optimization:
            # under trainer.validate; a step that optimizes by hand asks for them
            stack.enter_context(_optimizers(trainer))
        guard = WriteGuard(snapshot.large)
        for parameter in module.parameters():
            # a step may clip or zero what training has accumulated; the snapshot puts it back
            parameter.grad = None
        step = TrainingStep(trainer, model, guard)
        loader = CombinedLoader(_train_dataloader(trainer) if dataloader is None else dataloader, "max_size_cycle")
        loader.flattened = [_Fresh(item) for item in loader.flattened]
        sized = all(_sized(item) for item in loader.flattened)
        total = min(limit, max(len(item) for item in loader.flattened)) if sized and loader.flattened else limit
        if progress is not None:
            progress.known(total)
        try:
            yield step.batches(loader, limit, nothing if progress is None else progress.batch_done), step
        finally:
            guard.restore()
            snapshot.lost += guard.changed()


@contextlib.contextmanager
def _optimizers(trainer: pl.Trainer) -> Iterator[None]:
    """Let the strategy have the optimizers that a fit would have."""
    strategy = trainer.strategy
    before = strategy.optimizers, strategy.lr_scheduler_configs
    strategy.setup_optimizers(trainer)
    try:
        yield
    finally:
        strategy.optimizers, strategy.lr_scheduler_configs = before


def _warn_of_traces(trainer: pl.Trainer, names: Sequence[str]) -> None:
    """Say what cannot be put back, once in a run."""
    said = _TRACES.setdefault(trainer, set())
    new = [name for name in names if name not in said]
    said.update(new)
    if new:
        more = f" and {len(new) - 5} more" if len(new) > 5 else ""
        rank_zero_warn(
            f"Calibration leaves a trace: {', '.join(new[:5])}{more} changed in a way that cannot be undone, and the run goes on"
            " with it. Let training_step and the hooks around it leave this alone where self.training is False."
        )


def _train_dataloader(trainer: pl.Trainer) -> Any:
    """The train dataloaders of a fit, or those that a fit would have."""
    if trainer.train_dataloader is not None:
        return trainer.train_dataloader
    source = train_data_source(trainer)
    if not source.is_defined():
        raise CalibrationError(
            "There is no train dataloader to calibrate on; give StructuredPruning a calibration_dataloader."
        )
    if is_a(source.instance, pl.LightningDataModule):
        set_up_datamodule(trainer)
    return apply_to_collection(source.dataloader(), DataLoader, partial(prepared_train_dataloader, trainer))


class _Fresh:
    """Iterates a dataloader by a new iterator even where the dataloader would hand out its persistent one."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.loader, DataLoader) and self.loader.persistent_workers:
            return new_iterator(self.loader)
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]


def _sized(loader: _Fresh) -> bool:
    try:
        len(loader)
    except (TypeError, NotImplementedError):
        return False
    return True


@contextlib.contextmanager
def unscaled(trainer: pl.Trainer) -> Iterator[None]:
    """Divide the gradients that reach parameters by :func:`gradient_scale`, and say what those of activations come with."""
    scale = gradient_scale(trainer)
    scaled = [p for p in trainer.lightning_module.parameters() if p.requires_grad] if scale != 1 else []
    handles = [p.register_hook(lambda gradient: gradient / scale) for p in scaled]
    try:
        with scaled_loss(scale):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def untouched(trainer: pl.Trainer, dataloader: Iterable[Any] | None = None) -> Iterator[Snapshot]:
    """Run something inside a fit as if it had not happened.

    Random number generators, the attributes of the module, its submodules and torchmetrics, of the datamodule, dataloaders,
    samplers and datasets with all they refer to, the hyperparameters of optimizers, logged metrics, loggers and the other
    callbacks are as before afterwards, also when an error is raised. What is known to have changed all the same is warned of.
    Values of parameters are not looked at.

    Args:
        trainer: The trainer.
        dataloader: A dataloader that the trainer does not know.
    """
    module = trainer.lightning_module
    shards.reshard(module)
    snapshot = Snapshot(
        [
            ("module", module),
            ("datamodule", getattr(trainer, "datamodule", None)),
            *named_loaders("train_dataloader", trainer.train_dataloader),
            *named_loaders("val_dataloader", trainer.val_dataloaders),
            *named_loaders("calibration_dataloader", dataloader),
            *((f"optimizers[{n}]", optimizer) for n, optimizer in enumerate(trainer.optimizers)),
            *((f"lr_schedulers[{n}]", config.scheduler) for n, config in enumerate(trainer.lr_scheduler_configs)),
        ]
    )
    callbacks, loggers = trainer.callbacks, trainer.loggers  # type: ignore[attr-defined]
    should_stop = trainer.should_stop
    try:
        shown = trainer.progress_bar_callback
        trainer.callbacks = [c if c is shown else InertCallback(c) for c in callbacks]  # type: ignore[attr-defined]
        trainer.loggers = [SilentLogger(logger) for logger in loggers]
        with metrics_kept(trainer), random_state_kept():
            yield snapshot
    finally:
        trainer.callbacks, trainer.loggers = callbacks, loggers  # type: ignore[attr-defined]
        trainer.should_stop = should_stop
        shards.reshard(module)
        snapshot.restore()
        _warn_of_traces(trainer, snapshot.lost)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled modules eagerly: compiled code does not see hooks that come after it."""
    if not is_dynamo_loaded():
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def silent_logging(module: pl.LightningModule) -> Iterator[None]:
    """Let ``log`` and ``log_dict`` of the module, and of LightningModules inside of it, do nothing."""
    with contextlib.ExitStack() as stack:
        for inner in module.modules():
            if isinstance(inner, pl.LightningModule):
                for name in ("log", "log_dict"):
                    stack.enter_context(replaced(inner, name, nothing))
        yield


def check_calibration_loader(dataloader: Iterable[Any] | None) -> None:
    """Refuse an empty calibration dataloader.

    Raises:
        CalibrationError: If it has a length of 0.
    """
    if dataloader is not None and _sized(_Fresh(dataloader)) and len(dataloader) == 0:  # type: ignore[arg-type]
        raise CalibrationError("The calibration dataloader is empty; expected at least one batch.")
