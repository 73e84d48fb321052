"""Converting a Lightning checkpoint of a run that pruned to a model of transformers."""

from __future__ import annotations

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.errors import PlanError, PruningError
from lit_prune.io.lightning_checkpoint import merge_adapters, saved_prunings
from lit_prune.io.ties import separate
from lit_prune.plan import get_plan
from lit_prune.surgery.apply import cut


def convert_checkpoint(
    checkpoint: str | os.PathLike[str], model: PreTrainedModel, *, name: str | None = None
) -> PreTrainedModel:
    """Fill a dense model from a Lightning checkpoint of a run that pruned it, cutting it as the checkpoint's plan says.

    Args:
        checkpoint: A checkpoint file that ``Trainer.save_checkpoint`` or ``ModelCheckpoint`` wrote.
        model: The model that the run began with, with any weights; cut and filled in place.
        name: Name of the model within the LightningModule; found by the names of the weights if ``None``.

    Returns:
        ``model``, in eval mode.

    Raises:
        FileNotFoundError: If there is no such file.
        PruningError: If it is no Lightning checkpoint, holds more than plain data, or was written before the cut.
        PlanError: If plan or weights do not fit the model.
    """
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(
            f"No file at {checkpoint}; expected a Lightning checkpoint in one file. Consolidate a sharded one first."
        )
    content = _read(checkpoint)
    found = [s for s in saved_prunings(content) if s.plan is not None]
    if not found:
        raise PruningError(
            f"{checkpoint} holds no pruning plan: it was written before the cut, or by a run without one."
        )
    if len(found) > 1:
        paths = [s.model_path for s in found]
        found = [s for s in found if s.model_path == name]
        if len(found) != 1:
            raise PruningError(
                f"{checkpoint} holds the plans of several models, {paths}; say which by name, found {name!r}."
            )
    cut(model, found[0].plan_for(get_plan(model)))
    merge_adapters(model, content)
    weights = content["state_dict"]
    wanted = dict(model.state_dict())
    first = next(iter(wanted))
    prefixes = (
        [k.removesuffix(first) for k in weights if k.endswith(first)] if name is None else [f"{name}." if name else ""]
    )
    fitting = [p for p in prefixes if all(p + key in weights for key in wanted)]
    if len(fitting) != 1:
        raise PruningError(
            f"{checkpoint} has {len(fitting)} places with the weights of a {type(model).__name__} (looked at"
            f" {prefixes[:5]}); expected one. Say where it is within the LightningModule by its name."
        )
    for key, tensor in wanted.items():
        if weights[fitting[0] + key].shape != tensor.shape:
            raise PlanError(
                f"{checkpoint}: {fitting[0] + key!r} has shape {tuple(weights[fitting[0] + key].shape)}; the plan in it leaves"
                f" {tuple(tensor.shape)} of the model given. Give the model that the run began with."
            )
    values = {key: weights[fitting[0] + key] for key in wanted}
    separate(model, values)
    model.load_state_dict(values)
    return model.eval()


def _read(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a checkpoint.

    Raises:
        PruningError: If it is damaged, holds more than plain data, or is none of Lightning's.
    """
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise PruningError(
            f"{checkpoint} is damaged, or holds more than plain data; expected a checkpoint as Trainer.save_checkpoint writes it."
        ) from error
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        raise PruningError(f"{checkpoint} is not a Lightning checkpoint: it has no state_dict.")
    for name, value in weights.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise PruningError(f"{checkpoint} is damaged: {name!r} has values that are not finite.")
    return content
