"""What the callbacks use of Lightning that it does not document, in one place; ``tests/test_internals.py`` checks each.

Every function was checked with the versions in :data:`CHECKED`, in both of Lightning's packages. Add a version once
``tests/test_internals.py`` passes with it.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import RunningStage
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from lit_prune.callbacks.packages import is_a

CHECKED = ("2.6.0", "2.6.6")

# the file beside the shards of a checkpoint that holds everything but weights and optimizer states
METADATA_FILENAME = _METADATA_FILENAME
# what gives a training_step its dataloader_iter
IteratorFetcher = _DataLoaderIterDataFetcher


def call_module_hook(trainer: pl.Trainer, name: str, *arguments: Any) -> Any:
    """Call a hook of the LightningModule as the trainer does: profiled, and with ``log`` knowing what hook it is in."""
    return call._call_lightning_module_hook(trainer, name, *arguments)


def set_up_datamodule(trainer: pl.Trainer) -> None:
    """Call the datamodule's ``setup("fit")``."""
    call._call_lightning_datamodule_hook(trainer, "setup", stage="fit")


def transferred(trainer: pl.Trainer, batch: Any) -> Any:
    """Return a batch on the device, by the module's hooks for that and the trainer's strategy and precision."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)


def step_arguments(trainer: pl.Trainer, batch: Any, number: int) -> OrderedDict[str, Any]:
    """Return what the module's ``training_step`` is called with: the batch, and its number if the step asks for it."""
    return trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, number)


def last_fetched(fetcher: _DataLoaderIterDataFetcher) -> tuple[Any, int]:
    """Return the batch that the step took last from its ``dataloader_iter``, and its number."""
    return fetcher._batch, fetcher._batch_idx


def train_data_source(trainer: pl.Trainer) -> Any:
    """Return where the fit's dataloaders come from: an object with ``is_defined()``, ``instance`` and ``dataloader()``."""
    return trainer.fit_loop._data_source


def prepared_train_dataloader(trainer: pl.Trainer, loader: DataLoader) -> Any:
    """Return a dataloader as a fit would use it, with a distributed sampler where there are several processes."""
    return trainer._data_connector._prepare_dataloader(loader, shuffle=True, mode=RunningStage.TRAINING)


def wrapped_optimizers(trainer: pl.Trainer) -> list[Any]:
    """Return the strategy's LightningOptimizers, which are what ``self.optimizers()`` gives to a step."""
    return trainer.strategy._lightning_optimizers


def start_method(strategy: Strategy) -> str | None:
    """Return how a strategy's launcher starts processes of its own (``spawn``, ``fork``); ``None`` if it starts none so."""
    launcher = strategy.launcher
    return launcher._start_method if is_a(launcher, _MultiProcessingLauncher) else None


def averaged_model(callback: WeightAveraging) -> AveragedModel | None:
    """Return the average of a callback, whose ``module`` is the LightningModule; ``None`` before its ``setup``."""
    return callback._average_model


@contextlib.contextmanager
def metrics_kept(trainer: pl.Trainer) -> Iterator[None]:
    """Put back, at the end, the metrics that callbacks, loggers and the progress bar are given."""
    connector = trainer._logger_connector
    names = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
    values = {name: dict(getattr(connector, name)) for name in names}
    try:
        yield
    finally:
        for name, value in values.items():
            setattr(connector, name, value)


def forget_metrics(trainer: pl.Trainer) -> None:
    """Begin with no metrics for callbacks."""
    trainer._logger_connector._callback_metrics = {}


@contextlib.contextmanager
def validation_from_the_start(trainer: pl.Trainer) -> Iterator[Any]:
    """Give the validation loop, ready to run from its beginning; leave loop and trainer as they were, also after an error.

    A resumed fit has the loop in the state of its checkpoint, from which it would go on in the middle. The dataloaders are
    forgotten, too, where the fit had none yet: it asks for them when it would have without this run.
    """
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    attributes: dict[str, Any] = dict(vars(loop))
    progress = copy.deepcopy(loop.batch_progress.state_dict())
    seen = copy.copy(loop._seen_batches_per_dataloader)
    stage, first = trainer.state.stage, connector._first_loop_iter
    validated = getattr(trainer, "_last_val_time", None)
    loop.restarting = False
    loop.batch_progress.reset()
    loop.reset_restart_stage()
    try:
        yield loop
    finally:
        trainer.state.stage = stage
        connector._first_loop_iter = first
        if validated is not None:
            trainer._last_val_time = validated  # type: ignore[attr-defined]
        vars(loop).update(attributes)
        loop.batch_progress.load_state_dict(progress)
        loop._seen_batches_per_dataloader = seen
