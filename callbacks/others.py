"""What a cut means for the rest of a Trainer: averaged copies, best scores, references to old weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lit_prune import PruningPlan, find_model
from lit_prune.errors import UnsupportedCallbackError, UnsupportedModelError
from lit_prune.surgery import cut


def check_references(trainer: pl.Trainer, pl_module: pl.LightningModule, model: nn.Module) -> None:
    """Refuse callbacks that hold the model's parameters, or a copy of the model, and do not know of the cut.

    A callback that defines ``on_pruning_start`` or ``on_pruning_end`` is taken to know, and Lightning's ``WeightAveraging``
    is cut along.

    Raises:
        UnsupportedCallbackError: Naming callback and attribute.
    """
    own = {id(p) for p in model.parameters()}
    parts = {id(m) for m in pl_module.modules()}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        knows = hasattr(callback, "on_pruning_start") or hasattr(callback, "on_pruning_end")
        if knows or isinstance(callback, (WeightAveraging, ModelCheckpoint)):
            continue
        for name, value in vars(callback).items():
            for item in _items(value):
                stale = id(item) in own or (
                    isinstance(item, nn.Module) and id(item) not in parts and _is_copy(item, model)
                )
                if stale:
                    raise UnsupportedCallbackError(
                        f"{type(callback).__name__}.{name} holds {'parameters' if id(item) in own else 'a copy'} of the"
                        " model, which the cut would leave at the old sizes. Let the callback define"
                        " on_pruning_end(trainer, pl_module, pruning) and take hold of the model anew there (or"
                        " on_pruning_start, if it means to keep the dense one)."
                    )


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from (*value, *value.values())
    elif isinstance(value, (list, tuple, set)):
        yield from value
    else:
        yield value


def _is_copy(module: nn.Module, model: nn.Module) -> bool:
    try:
        found = find_model(module)[1]
    except UnsupportedModelError:
        return False
    return type(found) is type(model) and [p.shape for p in found.parameters()] == [p.shape for p in model.parameters()]


def averages(trainer: pl.Trainer) -> list[tuple[WeightAveraging, nn.Module]]:
    """Lightning's averaging callbacks with the LightningModule that each of them averages into."""
    return [
        (callback, callback._average_model.module)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None
    ]


def cut_averages(trainer: pl.Trainer, plan: PruningPlan, path: str | None) -> None:
    """Cut averaged copies of the module as the module was, all or none.

    :func:`restart_averages` has to follow: an average of weights from before the cut and repaired ones from after it would
    be neither.
    """
    with contextlib.ExitStack() as undos:
        for _, module in averages(trainer):
            undos.callback(cut(find_model(module, path)[1], plan))
        undos.pop_all()


def restart_averages(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Start the averages again from the module's present weights."""
    for callback, module in averages(trainer):
        module.load_state_dict(pl_module.state_dict())
        callback._average_model.n_averaged.zero_()  # type: ignore[union-attr]


def start_over(trainer: pl.Trainer) -> None:
    """Let what was best before the cut no longer compete with what comes after it.

    ``ModelCheckpoint`` forgets its best scores (the files stay), ``EarlyStopping`` its best score and its patience spent,
    ``ReduceLROnPlateau`` its plateau.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            _forget(callback)
        elif isinstance(callback, EarlyStopping):
            worst = torch.tensor(torch.inf)
            callback.best_score = worst if callback.monitor_op is torch.lt else -worst
            callback.wait_count = 0
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau):
            config.scheduler._reset()


def _forget(callback: ModelCheckpoint) -> None:
    if callback.best_model_path:
        rank_zero_info(
            f"ModelCheckpoint's best so far, {callback.best_model_path}, is of the model before the cut: the file stays and"
            " no longer competes."
        )
    callback.best_k_models = {}
    callback.kth_best_model_path = callback.best_model_path = ""
    callback.best_model_score = callback.current_score = None
    worst = torch.tensor(torch.inf)
    callback.kth_value = worst if callback.mode == "min" else -worst
