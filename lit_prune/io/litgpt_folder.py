"""Folders of pruned models of LitGPT: LitGPT's own form where a config can describe the model, else one of ours."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_prune._files import write_text
from lit_prune.architectures import find_group_sets
from lit_prune.errors import ArgumentTypeError, PlanError, PruningError, UnsupportedModelError
from lit_prune.groups import check_weights
from lit_prune.io.litgpt_config import (
    dense_config,
    gpt_class,
    import_litgpt,
    note_dense_config,
    stock_config,
)
from lit_prune.io.manifest import verify_weights
from lit_prune.io.module_folder import distinct_tensors
from lit_prune.io.output_folder import check_replaceable, replacing_folder
from lit_prune.plan import PruningPlan, get_plan, set_plan
from lit_prune.surgery.apply import cut_as_saved

# LitGPT's own names
CONFIG, WEIGHTS = "model_config.yaml", "lit_model.pth"
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "generation_config.json",
    "prompt_style.json",
)
# ours
DENSE_CONFIG, PLAN, OWN_WEIGHTS = "dense_model_config.yaml", "plan.json", "model.safetensors"
_TIES = "ties"


def is_litgpt_folder(directory: str | os.PathLike[str]) -> bool:
    """Whether a local folder was written by :func:`save_litgpt`, or is one of LitGPT's own."""
    return any((Path(directory) / name).is_file() for name in (DENSE_CONFIG, CONFIG))


def save_litgpt(
    model: nn.Module,
    directory: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    stock: bool | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a pruned ``litgpt.GPT`` to a folder that loads again.

    Where all layers kept the same sizes, a config of LitGPT describes the model, and the folder is one of LitGPT's
    (``lit_model.pth``, ``model_config.yaml``): ``litgpt.LLM.load`` and LitGPT's commands open it, and lit_prune need not be
    installed. Otherwise it holds safetensors, plan and the dense model's config, which :func:`load_litgpt` reads.

    Args:
        model: A ``litgpt.GPT`` that was cut.
        directory: Where to write; see :func:`lit_prune.save_pruned`.
        tokenizer: The LitGPT checkpoint folder of the dense model, whose tokenizer, generation config and prompt style are
            copied; or a tokenizer with ``save_pretrained``.
        stock: Whether the folder has to be LitGPT's own (``True``), or not to be (``False``). ``None`` for LitGPT's where that
            is possible, with a warning where it is not.
        state_dict: The whole weights by name, where the model's own parameters are shards of them.

    Returns:
        The directory.

    Raises:
        ArgumentTypeError: If ``tokenizer`` is neither a folder nor a tokenizer.
        PruningError: If the model was not pruned, or the folder cannot be written; what was there is unchanged then.
        UnsupportedModelError: If the model is no ``litgpt.GPT`` that a config of LitGPT and a plan rebuild, or with
            ``stock=True`` if a config alone cannot; the message names the first field that differs between layers.
    """
    check_replaceable(directory)
    companions = _companions(tokenizer)
    if gpt_class(model) is None:
        raise UnsupportedModelError(f"Expected a litgpt.GPT; found {type(model).__module__}.{type(model).__name__}.")
    plan = get_plan(model)
    if plan is None:
        raise PruningError(
            "The model was not pruned; save its state_dict() as lit_model.pth, and its config with litgpt."
        )
    check_weights(model, find_group_sets(model))
    dense = dense_config(model)
    config = None
    if stock is not False:
        try:
            config = stock_config(model)
        except UnsupportedModelError as error:
            if stock:
                raise
            warnings.warn(f"LitGPT itself cannot load {directory}. {error}", stacklevel=2)
    weights = {name: t.detach() for name, t in (model.state_dict() if state_dict is None else state_dict).items()}
    if config is None:
        _check_rebuilds(model, dense, plan)
    with replacing_folder(directory) as folder:
        plan.save(folder / PLAN)
        _write_config(folder / DENSE_CONFIG, dense)
        try:
            if config is None:
                _write_safetensors(folder / OWN_WEIGHTS, weights)
            else:
                _write_config(folder / CONFIG, config)
                torch.save(weights, folder / WEIGHTS)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise PruningError(f"The weights could not be written to {folder}: {error}.") from error
        for file in companions:
            shutil.copyfile(file, folder / file.name)
        if tokenizer is not None and not companions:
            tokenizer.save_pretrained(folder)
    return Path(directory)


def load_litgpt(
    directory: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto", verify: bool = False
) -> nn.Module:
    """Load a pruned ``litgpt.GPT`` that :func:`save_litgpt` wrote, in either form.

    Args:
        directory: The folder.
        dtype: Data type of the weights; that of the files if ``"auto"``.
        verify: Compare the SHA-256 of the weights with what was noted when they were saved, before they are read.

    Returns:
        The model, in eval mode. :func:`lit_prune.get_plan` gives its plan.

    Raises:
        FileNotFoundError: If a file is missing.
        PlanError: If the plan does not fit the weights.
        PruningError: If files are damaged, weights are missing, unknown or not finite, LitGPT is not installed, or ``verify``
            finds other weights than were saved.
    """
    folder = Path(directory)
    stock = (folder / CONFIG).is_file()
    weights_file = folder / (WEIGHTS if stock else OWN_WEIGHTS)
    if stock and not (folder / PLAN).is_file():
        raise PruningError(
            f"{folder} has no {PLAN}: it was not written by lit_prune.save_pruned. LitGPT itself loads it: litgpt.LLM.load."
        )
    for file in (weights_file, folder / DENSE_CONFIG, folder / PLAN):
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no {file.name}; expected a folder written by lit_prune.save_pruned.")
    litgpt = import_litgpt(str(directory))
    plan = PruningPlan.load(folder / PLAN)
    dense = _read_config(folder / DENSE_CONFIG, litgpt.Config)
    if verify:
        verify_weights(folder)
    weights, ties = _read_stock(weights_file) if stock else _read_safetensors(weights_file)
    config = _read_config(folder / CONFIG, litgpt.Config) if stock else dense
    with torch.device("meta"):
        model = litgpt.GPT(config)
    if stock:
        set_plan(model, plan)
        note_dense_config(model, dense)
    else:
        cut_as_saved(model, plan)
    _fill(model, weights, ties, weights_file)
    if stock:
        _check_plan(model, plan, folder)
    return model.eval() if dtype == "auto" else model.to(dtype).eval()


def _companions(tokenizer: Any) -> list[Path]:
    """The files of a LitGPT checkpoint folder that go along; none for a tokenizer."""
    if tokenizer is None or hasattr(tokenizer, "save_pretrained"):
        return []
    if not isinstance(tokenizer, str | os.PathLike):
        raise ArgumentTypeError(
            f"tokenizer must be the LitGPT checkpoint folder that holds it, or have save_pretrained; found a"
            f" {type(tokenizer).__name__}."
        )
    found = [Path(tokenizer) / name for name in _COMPANIONS if (Path(tokenizer) / name).is_file()]
    if not any(file.name.startswith("tokenizer.") for file in found):
        raise FileNotFoundError(f"{tokenizer} holds no tokenizer.json and no tokenizer.model.")
    return found


def _check_rebuilds(model: nn.Module, dense: Any, plan: PruningPlan) -> None:
    """Refuse a model that is more than a ``litgpt.GPT`` of the dense config with the plan applied.

    Raises:
        UnsupportedModelError: Naming the first weight that differs.
    """
    cls = gpt_class(model)
    assert cls is not None
    with torch.device("meta"):
        built = cls(dense)
    cut_as_saved(built, plan)
    expected = {name: tuple(t.shape) for name, t in built.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for name in (*found, *expected):
        if found.get(name) != expected.get(name):
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be rebuilt from a config of LitGPT and its plan: {name!r} has shape"
                f" {found.get(name)}; expected {expected.get(name)}. Save its state_dict and plan yourself."
            )


def _write_config(file: Path, config: Any) -> None:
    write_text(file, yaml.safe_dump(_plain(dataclasses.asdict(config))))


def _plain(value: Any) -> Any:
    """The value with tuples as lists, which YAML without tags knows."""
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _read_config(file: Path, cls: Any) -> Any:
    try:
        fields = yaml.safe_load(file.read_text(encoding="utf-8"))
        return cls(**fields)
    except (yaml.YAMLError, AssertionError, TypeError, ValueError) as error:
        raise PruningError(f"{file} is damaged: expected the fields of a litgpt.Config ({error}).") from error


def _write_safetensors(file: Path, weights: Mapping[str, Tensor]) -> None:
    distinct, ties = distinct_tensors(weights)
    plain = {name: tensor.contiguous() for name, tensor in distinct.items()}
    save_file(plain, file, metadata={"format": "pt", _TIES: json.dumps(ties)})


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    try:
        with safe_open(file, "pt") as content:
            weights = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            ties = json.loads((content.metadata() or {}).get(_TIES, "{}"))
        return {**weights, **{name: weights[place] for name, place in ties.items()}}, ties
    except (SafetensorError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise PruningError(f"{file} is damaged: {error}.") from error


def _read_stock(file: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise PruningError(f"{file} is damaged: {error}.") from error
    # the form that LitGPT's own training commands write
    weights = weights.get("model", weights) if isinstance(weights, Mapping) else weights
    if not isinstance(weights, Mapping) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise PruningError(f"{file} is damaged: expected a mapping of names to tensors.")
    return dict(weights), distinct_tensors(weights)[1]


def _fill(model: nn.Module, weights: Mapping[str, Tensor], ties: Mapping[str, str], file: Path) -> None:
    """Give a model on the device ``meta`` its weights, all of them, and what it computes at the start.

    Raises:
        PruningError: If weights are missing, unknown, or not finite floating-point numbers.
        PlanError: If one has another shape than the plan says.
    """
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for what, names in (("lacks", expected.keys() - weights.keys()), ("has unknown", weights.keys() - expected.keys())):
        if names:
            raise PruningError(f"{file} {what} weights: {sorted(names)[:3]} ({len(names)} tensors).")
    for name, tensor in weights.items():
        if tuple(tensor.shape) != expected[name]:
            raise PlanError(
                f"{file} does not fit its folder: {name!r} has shape {tuple(tensor.shape)}; expected {expected[name]} by config"
                " and plan."
            )
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise PruningError(f"{file} is damaged: {name!r} holds values that are not finite, or no floating point.")
    trained = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    model.load_state_dict(dict(weights), assign=True)
    for name, place in ties.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, model.get_parameter(place))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(trained[name])
    # no file holds the cosines and sines of the positions
    model.cos, model.sin = model.rope_cache(device=torch.device("cpu"))  # type: ignore[operator]


def _check_plan(model: nn.Module, plan: PruningPlan, folder: Path) -> None:
    """Refuse a plan that says other sizes than the model has.

    Raises:
        PlanError: Naming the first group set that differs.
    """
    kept = plan.entries_after()
    for group_set in find_group_sets(model):
        entry = kept.get(group_set.key)
        if entry is not None and len(entry.kept) != group_set.size:
            raise PlanError(
                f"{folder}/{PLAN} does not belong to the weights: it keeps {len(entry.kept)} groups of {group_set.name!r}"
                f" ({group_set.kind}), which has {group_set.size}."
            )
