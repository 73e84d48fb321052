"""What the Trainer's strategies need: which of them work, rebuilding before they load, wrapping anew after a cut."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from lit_prune.callbacks.others import averages
from lit_prune.checkpoint import cut_as_saved, merge_adapters
from lit_prune.errors import UnsupportedStrategyError

if TYPE_CHECKING:
    from lit_prune.callbacks.pruning import StructuredPruning

_SHARDED = (
    "Use ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1) with torch.distributed.fsdp.fully_shard in"
    " configure_model (FSDP2), which shards likewise; configs/llama3_70b_fsdp.yaml shows how."
)


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies that keep parameters where surgery cannot replace them.

    Raises:
        UnsupportedStrategyError: With the alternative.
    """
    name = type(strategy).__name__
    if isinstance(strategy, FSDPStrategy):
        raise UnsupportedStrategyError(
            f"{name} is FSDP1, which flattens parameters into one buffer, where no single one can be made smaller."
            f" {_SHARDED}"
        )
    if isinstance(strategy, DeepSpeedStrategy):
        raise UnsupportedStrategyError(
            f"{name} gives parameters and optimizer state to DeepSpeed's engine, where they cannot be replaced. {_SHARDED}"
        )
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise UnsupportedStrategyError(
            f"{name} is to start its processes by {strategy.launcher._start_method!r} (ddp_spawn, ddp_fork, ddp_notebook). They"
            " hand weights back to a model that was not cut. Use strategy='ddp', or start the processes with torchrun."
        )
    supported = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy))
    if not supported or "XLA" in name:
        raise UnsupportedStrategyError(
            f"StructuredPruning works on one device, with DDP, and with FSDP2 through ModelParallelStrategy; found {name}."
            " Use Trainer(strategy='auto') or strategy='ddp'."
        )


def renew_wrapper(trainer: pl.Trainer) -> None:
    """Wrap the module anew where the strategy's wrapper holds on to parameters.

    DDP's reducer holds buckets of the old ones and, with ``static_graph``, counts what calibration's backward passes did.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and strategy.model is not strategy.lightning_module:
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()


def rebuild_on_load(trainer: pl.Trainer, pl_module: pl.LightningModule, callback: StructuredPruning) -> None:
    """Let the strategy, until :func:`stop_rebuilding`, cut the model as a checkpoint says before anything of it loads.

    Strategies load at different times: most read the whole checkpoint first and fill the model later, and
    ``ModelParallelStrategy`` fills model and optimizers while it reads. ``load_checkpoint`` comes before both.
    """
    strategy = trainer.strategy
    present = strategy.__dict__.get("load_checkpoint")
    if isinstance(present, _RebuildingLoad) and not present.takes(pl_module, callback):
        stop_rebuilding(trainer)
    if not isinstance(strategy.__dict__.get("load_checkpoint"), _RebuildingLoad):
        strategy.load_checkpoint = _RebuildingLoad(trainer, pl_module)  # type: ignore[method-assign]
    strategy.load_checkpoint.callbacks.append(callback)  # type: ignore[attr-defined]


def stop_rebuilding(trainer: pl.Trainer) -> None:
    """Undo :func:`rebuild_on_load`."""
    if isinstance(trainer.strategy.__dict__.get("load_checkpoint"), _RebuildingLoad):
        del trainer.strategy.__dict__["load_checkpoint"]


class _RebuildingLoad:
    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.callbacks: list[StructuredPruning] = []
        self._trainer = trainer
        self._module = pl_module
        self._load = trainer.strategy.load_checkpoint

    def takes(self, pl_module: pl.LightningModule, callback: StructuredPruning) -> bool:
        """Whether this is of the same ``setup``, and not left over from a fit that an error ended before ``teardown``."""
        return self._module is pl_module and callback not in self.callbacks

    def __call__(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        strategy = self._trainer.strategy
        if isinstance(strategy, ModelParallelStrategy):
            self._rebuild(_metadata(Path(strategy.broadcast(checkpoint_path))))
            return self._load(checkpoint_path, *args, **kwargs)
        checkpoint = self._load(checkpoint_path, *args, **kwargs)
        self._rebuild(checkpoint)
        return checkpoint

    def _rebuild(self, checkpoint: dict[str, Any]) -> None:
        for callback in self.callbacks:
            callback.notify(self._trainer, self._module, "on_pruning_load_start", checkpoint)
        cut_as_saved(self._module, checkpoint, self._trainer.strategy.optimizers)
        for _, average in averages(self._trainer):
            cut_as_saved(average, checkpoint)
        for callback in self.callbacks:
            callback.notify(self._trainer, self._module, "on_pruning_load_end", checkpoint)
        merge_adapters(self._module, checkpoint)


def _metadata(path: Path) -> dict[str, Any]:
    """What a checkpoint says beside weights and optimizer states."""
    if path.is_dir():
        return torch.load(path / _METADATA_FILENAME, map_location="cpu", weights_only=True)
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
