"""Saving a pruned model so that it loads again, and loading it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from lit_prune.errors import PlanError, PruningError, UnsupportedModelError
from lit_prune.plan import PruningPlan
from lit_prune.surgery import apply_plan, get_plan

PLAN_FILE = "plan.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def save_pruned(model: nn.Module, directory: str | os.PathLike[str], tokenizer: Any = None) -> Path:
    """Write a pruned transformers model: safetensors, config, generation config, plan, and the tokenizer if one is given.

    Everything is written to a temporary folder that replaces ``directory`` at the end.

    Args:
        model: A transformers model that was cut by :func:`lit_prune.apply_plan`.
        directory: Where to write; an existing folder is replaced if it holds a saved model, and refused otherwise.
        tokenizer: A tokenizer to save beside the model.

    Returns:
        The directory.

    Raises:
        PruningError: If the model was not pruned, or ``directory`` holds something else.
        UnsupportedModelError: If it is not a transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"save_pruned writes transformers models; found {type(model).__name__}. Save its state_dict and plan yourself."
        )
    plan = get_plan(model)
    if plan is None:
        raise PruningError("The model was not pruned; save it with its own save_pretrained.")
    with _replacing_directory(Path(directory)) as temporary:
        # in the names of the model as it is in memory, not those that older files of its family have
        model.save_pretrained(temporary, save_original_format=False)
        plan.save(temporary / PLAN_FILE)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return Path(directory)


def load_pruned(directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a model that :func:`save_pruned` wrote.

    Args:
        directory: The folder.
        dtype: Data type of the weights; that of the files if ``None``.

    Returns:
        The pruned model, in eval mode.

    Raises:
        FileNotFoundError: If a file is missing.
        PlanError: If the plan does not fit the config.
        PruningError: If the weights are damaged or do not fit the plan.
    """
    directory = Path(directory)
    for name in ("config.json", PLAN_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} has no {name}; expected a folder written by lit_prune.save_pruned.")
    plan = PruningPlan.load(directory / PLAN_FILE)
    weights = _read_weights(directory)
    config = AutoConfig.from_pretrained(directory)
    names = config.architectures or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise UnsupportedModelError(f"{directory}/config.json names the class {names}; expected one of transformers.")
    first = next(t.dtype for t in weights.values() if t.is_floating_point())
    config.dtype = dtype or first
    with no_init_weights():
        # like from_pretrained, it leaves in float32 what is computed in float32, such as rotary frequencies
        model = cls._from_config(config)
    apply_plan(model, plan)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(expected) - set(weights)
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = {name: (shape, expected.get(name)) for name, shape in found.items() if expected.get(name) != shape}
    if wrong:
        name, (shape, wanted) = next(iter(wrong.items()))
        raise PlanError(
            f"The weights in {directory} do not fit the plan beside them: {name!r} has shape {shape}; expected {wanted}"
            f" ({len(wrong)} tensors differ)."
        )
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    held = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in weights}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = [n for n in tied if n not in parameters or id(parameters[n]) not in held]
    if missing:
        raise PruningError(f"{directory} lacks the weights {sorted(missing)[:3]} ({len(missing)} tensors).")
    if (directory / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    return model.eval()


def _read_weights(directory: Path) -> dict[str, torch.Tensor]:
    if (directory / INDEX_FILE).is_file():
        files = sorted(set(json.loads((directory / INDEX_FILE).read_text())["weight_map"].values()))
    else:
        files = [WEIGHTS_FILE]
    weights: dict[str, torch.Tensor] = {}
    for name in files:
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} has no {name}; expected the weights of the pruned model.")
        try:
            weights.update(load_file(directory / name))
        except SafetensorError as error:
            raise PruningError(f"{directory / name} is damaged: {error}.") from error
    return weights


@contextmanager
def _replacing_directory(directory: Path) -> Iterator[Path]:
    if directory.exists() and (
        not directory.is_dir() or (any(directory.iterdir()) and not (directory / PLAN_FILE).exists())
    ):
        raise PruningError(f"{directory} exists and holds no pruned model; refusing to replace it.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        temporary.chmod(0o755)
        yield temporary
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
