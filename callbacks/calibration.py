"""Running calibration batches inside a fit, leaving no trace of it."""

from __future__ import annotations

import contextlib
import copy
import resource
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric
from tqdm.auto import tqdm

from lit_prune.distributed import Ranks
from lit_prune.errors import CalibrationError, RankMismatchError
from lit_prune.plan import PruningPlan
from lit_prune.statistics import check_repeatable


def calibration_batches(trainer: pl.Trainer, dataloader: Iterable[Any] | None, limit: int) -> Iterator[Any]:
    """Batches for calibration, on the device, as the user's ``training_step`` expects them.

    The train dataloaders are iterated by iterators of their own, so that the position of the running epoch stays.

    Args:
        trainer: The trainer, in the middle of a fit.
        dataloader: A dataloader for calibration, or ``None`` for the train dataloaders.
        limit: Number of batches at most.
    """
    loader = CombinedLoader(_train_dataloader(trainer) if dataloader is None else dataloader, "max_size_cycle")
    loader.flattened = [_Fresh(item) for item in loader.flattened]
    module = trainer.lightning_module
    iterator = iter(loader)
    total = min(limit, len(loader)) if all(_sized(item) for item in loader.flattened) else limit
    with _bar(trainer, "Calibration", total=total) as bar:
        for _ in range(limit):
            try:
                batch = next(iterator)[0]
            except StopIteration:
                return
            batch = trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            yield call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)
            bar.update()


@contextlib.contextmanager
def measured(costs: dict[str, float], device: torch.device) -> Iterator[None]:
    """Add to ``costs`` the seconds that calibration takes, and the peak memory of the device (of the process, on a CPU)."""
    start = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        # the process's highest so far, in KiB (bytes on macOS)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    costs["calibration_seconds"] = costs.get("calibration_seconds", 0.0) + time.perf_counter() - start
    costs["calibration_peak_megabytes"] = max(costs.get("calibration_peak_megabytes", 0.0), peak / 1e6)


def _train_dataloader(trainer: pl.Trainer) -> Any:
    """The train dataloaders of a fit, or those that a fit would have."""
    if trainer.train_dataloader is not None:
        return trainer.train_dataloader
    source = trainer.fit_loop._data_source
    if not source.is_defined():
        raise CalibrationError(
            "There is no train dataloader to calibrate on; give StructuredPruning a calibration_dataloader."
        )
    if isinstance(source.instance, pl.LightningDataModule):
        call._call_lightning_datamodule_hook(trainer, "setup", stage="fit")
    return apply_to_collection(
        source.dataloader(),
        DataLoader,
        trainer._data_connector._prepare_dataloader,
        shuffle=True,
        mode=RunningStage.TRAINING,
    )


def progress_bar(trainer: pl.Trainer, description: str) -> Callable[[Sequence[Any]], Iterable[Any]]:
    """A function that shows how far an iteration has come: on rank zero, and only if the trainer shows progress at all."""
    return lambda items: _bar(trainer, description, iterable=items)


def _bar(trainer: pl.Trainer, description: str, **arguments: Any) -> tqdm:
    silent = not trainer.is_global_zero or trainer.progress_bar_callback is None
    return tqdm(desc=description, leave=False, dynamic_ncols=True, disable=silent, **arguments)


class _Fresh:
    """Iterates a dataloader by a new iterator even where the dataloader would hand out its persistent one."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.loader, DataLoader) and self.loader.persistent_workers:
            return self.loader._get_iterator()
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]


def _sized(loader: _Fresh) -> bool:
    try:
        len(loader)
    except (TypeError, NotImplementedError):
        return False
    return True


def training_loss(trainer: pl.Trainer) -> Callable[[Any], Tensor | None]:
    """A function that runs the user's ``training_step`` on a batch and returns its loss.

    The step is called on the LightningModule itself, past any wrapper of the strategy, so that gradients stay local. In
    float16 they are scaled on their way, as in training, so that small ones do not vanish; see :func:`unscaled`.
    """
    scale = gradient_scale(trainer)
    module = trainer.lightning_module
    number = -1

    def loss(batch: Any) -> Tensor | None:
        nonlocal number
        number += 1
        arguments = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, number)
        with trainer.precision_plugin.train_step_context():
            output = module.training_step(*arguments.values())
        value = output["loss"] if isinstance(output, Mapping) and "loss" in output else output
        return _ScaledGradient.apply(value, scale) if scale != 1 and isinstance(value, Tensor) else value  # type: ignore[return-value]

    return loss


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
    if scaler is None or not scaler.is_enabled() or isinstance(trainer.strategy, ModelParallelStrategy):
        return 1.0
    return max(1.0, float(scaler.get_scale()) / 16)


@contextlib.contextmanager
def unscaled(trainer: pl.Trainer) -> Iterator[None]:
    """Divide the gradients that reach parameters by :func:`gradient_scale`."""
    scale = gradient_scale(trainer)
    scaled = [p for p in trainer.lightning_module.parameters() if p.requires_grad] if scale != 1 else []
    handles = [p.register_hook(lambda gradient: gradient / scale) for p in scaled]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def untouched(trainer: pl.Trainer) -> Iterator[None]:
    """Run something inside a fit as if it had not happened.

    Random number generators (also those of the dataloaders and samplers), the dataloaders' positions, buffers,
    torchmetrics' states, logged metrics, loggers and the other callbacks are as before afterwards, also when an error is
    raised.
    """
    module = trainer.lightning_module
    connector = trainer._logger_connector
    generators = {id(g): (g, g.get_state()) for loader in _loaders(trainer) for g in _generators(loader)}
    attributes_of = [(loader, dict(vars(loader))) for loader in _loaders(trainer) if hasattr(loader, "__dict__")]
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    metrics = [(m, copy.deepcopy(m.__getstate__())) for m in module.modules() if isinstance(m, Metric)]
    values = {
        name: dict(getattr(connector, name))
        for name in ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
    }
    callbacks, loggers = trainer.callbacks, trainer.loggers  # type: ignore[attr-defined]
    trainer.callbacks = [c for c in callbacks if c is trainer.progress_bar_callback]  # type: ignore[attr-defined]
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        with isolate_rng():
            yield
    finally:
        trainer.callbacks, trainer.loggers = callbacks, loggers  # type: ignore[attr-defined]
        for name, value in values.items():
            setattr(connector, name, value)
        with torch.no_grad():
            for buffer, content in buffers:
                buffer.copy_(content)
        for metric, attributes in metrics:
            # not __setstate__, which would wrap update and compute once more
            metric.__dict__.update(attributes)
        for generator, state in generators.values():
            generator.set_state(state)
        # a dataloader that can be resumed remembers the iterator it gave out last, or how far it came
        for loader, before in attributes_of:
            vars(loader).clear()
            vars(loader).update(before)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled modules eagerly: compiled code does not see hooks that come after it."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def silent_logging(module: pl.LightningModule) -> Iterator[None]:
    """Let the module's ``log`` and ``log_dict`` do nothing."""
    for name in ("log", "log_dict"):
        setattr(module, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            delattr(module, name)


def ranks_of(trainer: pl.Trainer) -> Ranks | None:
    """The processes of the run, or ``None`` if there is only one."""
    if trainer.world_size == 1:
        return None
    sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    return Ranks(trainer.strategy.root_device, mean_gradients=not sharded)


def check_same_on_all_ranks(trainer: pl.Trainer, plan: PruningPlan) -> None:
    """Refuse to cut if the processes do not agree on the plan; every process raises, none hangs.

    Raises:
        RankMismatchError: If the digests differ.
    """
    if trainer.world_size == 1:
        return
    digests: list[str] = [""] * trainer.world_size
    torch.distributed.all_gather_object(digests, plan.digest())
    if len(set(digests)) > 1:
        raise RankMismatchError(
            f"The processes came to different plans: {[d[:12] for d in digests]} by rank. Do they hold the same weights, and"
            " does a criterion of your own depend on the rank? Nothing was pruned."
        )


def check_calibration_loader(dataloader: Iterable[Any] | None) -> None:
    """Refuse a calibration dataloader that is empty, or that can be iterated only once.

    Raises:
        CalibrationError: If it has a length of 0.
        TypeError: If it is an iterator.
    """
    if dataloader is not None:
        check_repeatable(dataloader, "calibration_dataloader")
    if dataloader is not None and _sized(_Fresh(dataloader)) and len(dataloader) == 0:  # type: ignore[arg-type]
        raise CalibrationError("The calibration dataloader is empty; expected at least one batch.")


def _loaders(trainer: pl.Trainer) -> Iterator[Any]:
    for loader in (trainer.train_dataloader, trainer.val_dataloaders):
        if loader is not None:
            yield from CombinedLoader(loader, "sequential").flattened


def _generators(loader: Any) -> Iterator[torch.Generator]:
    sampler = getattr(loader, "sampler", None)
    for owner in (loader, sampler, getattr(loader, "batch_sampler", None), getattr(sampler, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator
