"""What a cut means for the rest of a Trainer: averaged copies, best scores, references to old weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from lit_prune.callbacks.detection import model_in
from lit_prune.callbacks.lightning_internals import averaged_model
from lit_prune.callbacks.packages import is_a
from lit_prune.errors import UnsupportedCallbackError, UnsupportedModelError
from lit_prune.group_data import kept_group_sets
from lit_prune.plan import PruningPlan
from lit_prune.surgery.apply import cut
from lit_prune.surgery.references import attributes, items, stale_copies
from lit_prune.torch_internals import reset_plateau, tables


def check_references(trainer: pl.Trainer, pl_module: pl.LightningModule, model: nn.Module) -> None:
    """Refuse callbacks that hold a copy of the model, or tensors of its parameters' sizes, and do not know of the cut.

    Parameters themselves stay the objects that they are, so that whoever holds them follows; only those that FSDP2 shards
    are replaced. A callback that defines ``on_pruning_start`` or ``on_pruning_end`` is taken to know, and Lightning's
    ``WeightAveraging`` is pruned together with the model.

    Raises:
        UnsupportedCallbackError: Naming callback and attribute.
        UnsupportedModelError: If the LightningModule averages the model into a copy.
    """
    parts = {id(m) for m in pl_module.modules()}
    names = [name for name, _ in model.named_parameters()]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        knows = hasattr(callback, "on_pruning_start") or hasattr(callback, "on_pruning_end")
        if knows or is_a(callback, WeightAveraging) or is_a(callback, ModelCheckpoint):
            continue
        found = dict(stale_copies(callback, model, names))
        for name, value in vars(callback).items():
            copies = (m for m in items(value) if isinstance(m, nn.Module) and id(m) not in parts)
            if name not in found and any(_is_copy(m, model) for m in copies):
                found[name] = "a copy of the model"
        for name, what in found.items():
            raise UnsupportedCallbackError(
                f"{type(callback).__name__}.{name} holds {what}, which the cut would leave at the old sizes. Let the callback"
                " define on_pruning_end(trainer, pl_module, pruning) and take the model again there (or"
                " on_pruning_start, if it means to keep the dense one)."
            )
    _check_averages(pl_module, model)


def _check_averages(pl_module: pl.LightningModule, model: nn.Module) -> None:
    """Refuse an average of the model that the LightningModule keeps itself; a dense copy that is no average is a teacher."""
    parts = _pruned_parts(model)
    inside = {id(m) for m in parts}
    copied = [model] if kept_group_sets(model) is None else parts
    candidates = [
        (path, item)
        for path, holder in pl_module.named_modules()
        for value in (*tables(holder)[2].values(), *(v for _, v in attributes(holder)))
        for item in items(value)
        if isinstance(item, nn.Module) and id(item) not in inside
    ]
    for path, candidate in candidates:
        kept = getattr(candidate, "module", None)
        averages_itself = any(
            hasattr(candidate, name) for name in ("update_parameters", "update", "n_averaged", "decay")
        )
        if averages_itself and isinstance(kept, nn.Module) and any(_is_copy(kept, part) for part in copied):
            raise UnsupportedModelError(
                f"{type(pl_module).__name__} holds a {type(candidate).__name__} (in {path or 'itself'!r}), an average of the"
                " model that the cut would leave at the old sizes. Use Lightning's WeightAveraging callback, which is cut"
                " along, or make the average after the cut."
            )


def _pruned_parts(model: nn.Module) -> list[nn.Module]:
    """The model and the modules in it; where groups were found by running it, those that hold parameters of groups.

    A LightningModule that is pruned as a whole may hold an average of itself, which is not run and has no groups.
    """
    kept = kept_group_sets(model)
    if kept is None:
        return list(model.modules())
    grouped = {id(model.get_parameter(part.parameter)) for group_set in kept for part in group_set.slices}
    return [m for m in model.modules() if any(id(p) in grouped for p in m.parameters())]


def _is_copy(module: nn.Module, model: nn.Module) -> bool:
    candidates = [module]
    with contextlib.suppress(UnsupportedModelError):
        candidates.append(model_in(module)[1])
    shapes = [p.shape for p in model.parameters()]
    return any(type(m) is type(model) and [p.shape for p in m.parameters()] == shapes for m in candidates)


def averages(trainer: pl.Trainer) -> list[tuple[AveragedModel, nn.Module]]:
    """The averages of Lightning's averaging callbacks, each with the LightningModule that it averages into."""
    return [
        (average, average.module)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if is_a(callback, WeightAveraging) and (average := averaged_model(callback)) is not None
    ]


def prune_weight_averages(trainer: pl.Trainer, plan: PruningPlan, path: str | None) -> Callable[[], None]:
    """Cut averaged copies of the module as the module was, all or none.

    :func:`restart_averages` has to follow: an average of weights from before the cut and repaired ones from after it would
    be neither.

    Returns:
        A function that undoes this.
    """
    with contextlib.ExitStack() as undos:
        for _, module in averages(trainer):
            undos.callback(cut(model_in(module, path)[1], plan))
        return undos.pop_all().close


def restart_averages(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Start the averages again from the module's present weights."""
    for average, module in averages(trainer):
        # not through state_dict and load_state_dict, which may be the user's own and leave parts out
        for held, present in ((module.parameters(), pl_module.parameters()), (module.buffers(), pl_module.buffers())):
            for average_value, value in zip(held, present, strict=True):
                average_value.data.copy_(value.data)
        average.n_averaged.zero_()


def optimizers_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Optimizer]:
    """The trainer's optimizers that are over parameters of a module; it keeps those of an earlier fit with another one."""
    own = {id(p) for p in pl_module.parameters()}
    return [o for o in trainer.strategy.optimizers if any(id(p) in own for g in o.param_groups for p in g["params"])]


def reset_best_scores(trainer: pl.Trainer) -> None:
    """Let what was best before the cut no longer compete with what comes after it.

    ``ModelCheckpoint`` forgets its best scores (the files stay), ``EarlyStopping`` its best score and its patience spent,
    ``ReduceLROnPlateau`` its plateau.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if is_a(callback, ModelCheckpoint) and callback.monitor is not None:
            _forget(callback)
        elif is_a(callback, EarlyStopping):
            worst = torch.tensor(torch.inf)
            callback.best_score = worst if callback.monitor_op is torch.lt else -worst
            callback.wait_count = 0
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau):
            reset_plateau(config.scheduler)


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
