"""What the Trainer's strategies need: which of them work, rebuilding before they load, wrapping anew after a cut."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from lit_prune.callbacks.compatibility import averages, optimizers_of
from lit_prune.callbacks.detection import model_in
from lit_prune.callbacks.lightning_internals import METADATA_FILENAME, start_method
from lit_prune.callbacks.packages import is_a
from lit_prune.callbacks.protocol import Pruning
from lit_prune.callbacks.ranks import ranks_of
from lit_prune.distributed.ranks import together, unguarded
from lit_prune.errors import UnsupportedModelError, UnsupportedStrategyError
from lit_prune.io.lightning_checkpoint import (
    check_weights,
    cut_as_saved,
    merge_adapters,
    put_states,
    saved_prunings,
    true_to,
)
from lit_prune.plan import FORMAT

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
    if is_a(strategy, FSDPStrategy):
        raise UnsupportedStrategyError(
            f"{name} is FSDP1, which flattens parameters into one buffer, where no single one can be made smaller."
            f" {_SHARDED}"
        )
    if is_a(strategy, DeepSpeedStrategy):
        raise UnsupportedStrategyError(
            f"{name} gives parameters and optimizer state to DeepSpeed's engine, where they cannot be replaced. {_SHARDED}"
        )
    if (method := start_method(strategy)) is not None:
        raise UnsupportedStrategyError(
            f"{name} is to start its processes by {method!r} (ddp_spawn, ddp_fork, ddp_notebook). They"
            " hand weights back to a model that was not cut. Use strategy='ddp', or start the processes with torchrun."
        )
    supported = any(is_a(strategy, kind) for kind in (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy))
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
    if is_a(strategy, DDPStrategy) and strategy.model is not strategy.lightning_module:
        with unguarded(ranks_of(trainer)):
            strategy.model = strategy.lightning_module
            strategy.configure_ddp()


def follow_checkpoints(trainer: pl.Trainer, callback: Pruning) -> None:
    """Let the strategy write what the weights need into every checkpoint, and cut the model before one of them loads.

    Callbacks are not asked when weights alone are saved (``save_weights_only=True``); the strategy saves in every mode, and
    also after the fit. Strategies load at different times: most read the whole checkpoint first and fill the model later,
    and ``ModelParallelStrategy`` fills model and optimizers while it reads. ``load_checkpoint`` comes before both.
    """
    strategy = trainer.strategy
    saving, loading = strategy.save_checkpoint, strategy.load_checkpoint
    if not isinstance(saving, _Saving):
        strategy.save_checkpoint = saving = _Saving(trainer, saving)  # type: ignore[method-assign]
    if not isinstance(loading, _Loading):
        strategy.load_checkpoint = loading = _Loading(trainer, loading)  # type: ignore[method-assign]
    for callbacks in (saving.callbacks, loading.callbacks):
        if not any(c is callback for c in callbacks):
            callbacks.append(callback)


def stop_rebuilding(trainer: pl.Trainer) -> None:
    """Let the strategy load as it did before :func:`follow_checkpoints`; saving stays, for checkpoints after the fit."""
    if isinstance(trainer.strategy.__dict__.get("load_checkpoint"), _Loading):
        del trainer.strategy.__dict__["load_checkpoint"]


class _Saving:
    """A strategy's ``save_checkpoint``, which adds the states of callbacks that have to do with the weights."""

    def __init__(self, trainer: pl.Trainer, save: Callable[..., None]) -> None:
        self.callbacks: list[Pruning] = []
        self._trainer = trainer
        self._save = save

    def __call__(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        written = checkpoint.get("callbacks", {})
        # calibration takes the callbacks from the Trainer, and the user's step may save meanwhile
        callbacks = dict.fromkeys((*self.callbacks, *self._trainer.callbacks))  # type: ignore[attr-defined]
        states = []
        for callback in (c for c in callbacks if getattr(c, "state_beside_weights", False)):
            # the object that is written already, which is then not written twice
            state = written.get(callback.state_key) or callback.state_dict()
            states.append(self._true(callback, state))
        put_states(checkpoint, states)
        self._save(checkpoint, *args, **kwargs)

    def _true(self, callback: Any, state: Mapping[str, Any]) -> Mapping[str, Any]:
        if not any(callback is c for c in self.callbacks):
            return state
        try:
            return true_to(callback.model(self._trainer.lightning_module), state)
        except UnsupportedModelError:
            # a run that ends because of this may still save what it has
            return state


class _Loading:
    """A strategy's ``load_checkpoint``, which makes the model fit before anything loads."""

    def __init__(self, trainer: pl.Trainer, load: Callable[..., dict[str, Any]]) -> None:
        self.callbacks: list[Pruning] = []
        self._trainer = trainer
        self._load = load

    def __call__(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        strategy = self._trainer.strategy
        if is_a(strategy, ModelParallelStrategy):
            path = Path(strategy.broadcast(checkpoint_path))
            with self._together():
                metadata = _metadata(path)
                self._rebuild(metadata)
            checkpoint = self._load(checkpoint_path, *args, **kwargs)
            if "callbacks" in metadata:
                checkpoint["callbacks"] = metadata["callbacks"]
            return checkpoint
        with self._together():
            checkpoint = self._load(checkpoint_path, *args, **kwargs)
            self._rebuild(checkpoint)
        return checkpoint

    def _together(self) -> contextlib.AbstractContextManager[None]:
        return together(ranks_of(self._trainer), "loading a checkpoint")

    def _rebuild(self, checkpoint: dict[str, Any]) -> None:
        # the module at hand, also where the fit before ended in an error
        trainer, module = self._trainer, self._trainer.lightning_module
        check_weights(module, checkpoint)
        states = self._states(checkpoint)
        for callback, state in states:
            callback.check_resumable(trainer, state)
        _hand_over(checkpoint, states)
        for callback in self.callbacks:
            callback.notify(trainer, module, "on_pruning_load_start", checkpoint)
        cut_as_saved(module, checkpoint, optimizers_of(trainer, module))
        for _, average in averages(trainer):
            cut_as_saved(average, checkpoint)
        # not left to the Trainer, which passes over checkpoints of weights alone
        for callback, state in states:
            callback.load_state_dict(state)
        for callback in self.callbacks:
            callback.notify(trainer, module, "on_pruning_load_end", checkpoint)
        merge_adapters(module, checkpoint)

    def _states(self, checkpoint: Mapping[str, Any]) -> list[tuple[Pruning, dict[str, Any]]]:
        """The state of each callback: the one that is of the same model, whatever path it was given by."""
        module = self._trainer.lightning_module
        saved = [(model_in(module, s.model_path)[1], s.state) for s in saved_prunings(checkpoint)]
        return [(c, dict(state)) for c in self.callbacks for model, state in saved if c.model(module) is model]


def _hand_over(checkpoint: dict[str, Any], states: Sequence[tuple[Pruning, dict[str, Any]]]) -> None:
    """Put each state where the Trainer looks for that of the callback, whose key may have been another."""
    if "callbacks" in checkpoint and states:
        others = {k: s for k, s in checkpoint["callbacks"].items() if not _is_pruning(s)}
        checkpoint["callbacks"] = {**others, **{callback.state_key: state for callback, state in states}}


def _is_pruning(state: Any) -> bool:
    return isinstance(state, Mapping) and state.get("format") == FORMAT


def _metadata(path: Path) -> dict[str, Any]:
    """What a checkpoint says beside weights and optimizer states."""
    if path.is_dir():
        return torch.load(path / METADATA_FILENAME, map_location="cpu", weights_only=True)
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
