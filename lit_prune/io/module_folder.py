"""Folders of pruned models that are no transformers models: weights and plan; the module itself is the user's code."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import cached_file

from lit_prune._files import read_json, write_text
from lit_prune.architectures.registry import find_model, submodule
from lit_prune.arguments import shown
from lit_prune.errors import ArgumentTypeError, ArgumentValueError, PlanError, PruningError, UnsupportedModelError
from lit_prune.group_data import tensors_of
from lit_prune.io.manifest import MANIFEST, verify_weights
from lit_prune.io.ties import memory_of, separate
from lit_prune.modeling_pruned import weight_files, weight_headers
from lit_prune.plan import PruningPlan, get_plan
from lit_prune.surgery.apply import cut
from lit_prune.version import __version__

FORMAT = "lit_prune.module"
VERSION = 1
CONFIG, PLAN = "config.json", "plan.json"
_WEIGHTS = "model{suffix}.safetensors"
_BUILT = "Give load_pruned(directory, model=...) a dense model, built as the one that was pruned, or a function that builds it."


def write_module(
    module: nn.Module,
    folder: Path,
    *,
    tokenizer: Any = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    max_shard_size: int | str = "5GB",
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights, plan and a small config of a pruned model into an empty folder.

    Args:
        module: A module that was cut, or that holds a model which was.
        folder: The folder.
        tokenizer: A tokenizer to save beside the model.
        metrics: Figures to note in the config, by stage and name.
        max_shard_size: Size at which a new weights file begins.
        state_dict: The whole weights by name, where the model's own parameters are shards of them.

    Raises:
        PruningError: If the weights cannot be written, on a full disk for instance.
        UnsupportedModelError: If the state of the model is not all tensors in memory.
    """
    path, plan = pruned_within(module)
    weights, ties = distinct_tensors(_checked_state(module, state_dict))
    split = split_torch_state_dict_into_shards(weights, filename_pattern=_WEIGHTS, max_shard_size=max_shard_size)
    try:
        for file, names in split.filename_to_tensors.items():
            save_file({n: weights[n].contiguous() for n in names}, folder / file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise PruningError(f"The weights could not be written to {folder}: {error}.") from error
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
    plan.save(folder / PLAN)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "lit_prune": __version__,
        "class": f"{type(module).__module__}.{type(module).__qualname__}",
        "path": path,
        "plan": plan.digest(),
        "ties": ties,
        **({"figures": {stage: dict(values) for stage, values in metrics.items()}} if metrics else {}),
    }
    write_text(folder / CONFIG, json.dumps(config, indent=1) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def pruned_within(module: nn.Module) -> tuple[str, PruningPlan]:
    """Qualified name of the model within a module that was cut, and its plan.

    Raises:
        PruningError: If nothing in the module was pruned.
    """
    try:
        path, model = find_model(module)
        plan = get_plan(model)
    except UnsupportedModelError:
        plan = None
    if plan is None:
        raise PruningError(
            f"This {type(module).__name__} was not pruned, nor was a module in it: there is no plan to save. Give the module"
            " that was pruned, or save the state_dict of a dense one."
        )
    return path, plan


def check_saveable(module: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Refuse a module whose state cannot be written, before any work is done.

    Raises:
        PruningError: If nothing in it was pruned.
        UnsupportedModelError: If its state is not all tensors in memory.
    """
    pruned_within(module)
    _checked_state(module, state_dict)


def _checked_state(model: nn.Module, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    state: dict[str, Any] = dict(model.state_dict() if state_dict is None else state_dict)
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
            found = (
                type(value).__name__
                if not isinstance(value, Tensor)
                else f"{value.layout}, {value.dtype}, {value.device}"
            )
            raise UnsupportedModelError(
                f"{name!r} of the state of {type(model).__name__} is no plain tensor in memory ({found}), which safetensors"
                " cannot hold. Save the model's state_dict and its plan (lit_prune.get_plan(model).save(path)) yourself."
            )
    return state


def distinct_tensors(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, each written once, and by the other names of those that several names share, the name it is under."""
    weights: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    places: dict[Any, str] = {}
    for name, tensor in state.items():
        place = memory_of(tensor)
        if tensor.numel() and place in places:
            ties[name] = places[place]
            continue
        places[place] = name
        weights[name] = tensor.detach()
    # views of one buffer, like the weights of an LSTM on a GPU
    storages: dict[int, int] = {}
    for name, tensor in weights.items():
        pointer = tensor.untyped_storage().data_ptr()
        if storages.setdefault(pointer, id(tensor)) != id(tensor):
            weights[name] = tensor.clone()
    return weights, ties


def is_module_folder(fields: Any) -> bool:
    """Whether the content of a ``config.json`` is that of a folder which :func:`write_module` wrote."""
    return isinstance(fields, Mapping) and fields.get("format") == FORMAT


def load_module(
    directory: str,
    file: Path,
    model: nn.Module | Callable[[], nn.Module] | None,
    *,
    dtype: torch.dtype | str,
    verify: bool,
    hub: Mapping[str, Any],
) -> nn.Module:
    """Cut a dense module by the plan of a folder and load the folder's weights into it, all of them.

    Args:
        directory: The folder, or the name of a repository on the hub.
        file: Its ``config.json``.
        model: The dense module, or a function that builds it. One that is cut by this plan already only gets the weights.
        dtype: Data type of parameters and buffers; that of the files if ``"auto"``.
        verify: Compare checksums first.
        hub: Options for files from the hub.

    Raises:
        ArgumentError: If there is no module, or something else.
        PlanError: If the plan was changed, or does not fit the module or the weights; the module is as it was then.
        PruningError: If files are damaged, or weights are missing, unknown or not finite.
    """
    fields = _checked_fields(file)
    dtype = floating_dtype(dtype)
    dense = _built(model, directory, fields)
    plan = PruningPlan.load(str(cached_file(directory, PLAN, **hub)))
    if plan.digest() != fields["plan"]:
        raise PlanError(
            f"{directory}/{PLAN} was changed after it was saved: its digest is {plan.digest()[:12]}; expected"
            f" {fields['plan'][:12]}. The weights belong to the plan as it was."
        )
    files = weight_files(directory, **hub)
    headers = weight_headers(directory, files)
    if verify:
        cached_file(directory, MANIFEST, _raise_exceptions_for_missing_entries=False, **hub)
        verify_weights(file.parent)
    undo = _cut_once(dense, fields["path"], plan, directory)
    try:
        _check_headers(dense, directory, headers, fields["ties"])
        _fill(dense, _read(directory, files), fields["ties"], dtype, directory)
    except BaseException:
        undo()
        raise
    return dense.eval()


def floating_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """A data type by itself or its name; ``"auto"`` as it is.

    Raises:
        ArgumentValueError: If it is not a floating type.
    """
    found = dtype if dtype == "auto" or isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if found != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ArgumentValueError(f"dtype must be a floating type of torch, its name, or 'auto'; found {shown(dtype)}.")
    return found


def _checked_fields(file: Path) -> Mapping[str, Any]:
    fields = read_json(file)
    ties = fields.get("ties") if isinstance(fields, Mapping) else None
    texts = isinstance(ties, Mapping) and all(isinstance(name, str) for pair in ties.items() for name in pair)
    texts = texts and all(isinstance(fields.get(key), str) for key in ("plan", "path"))
    if not texts or fields.get("version") != VERSION:
        raise PruningError(
            f"{file} is damaged, or of another version of lit_prune: expected format {FORMAT!r} and version {VERSION}."
        )
    return fields


def _built(model: Any, directory: str, fields: Mapping[str, Any]) -> nn.Module:
    """The dense model that was given, or built by what was given."""
    cls = shown(fields.get("class"))
    if model is None:
        raise ArgumentValueError(
            f"{directory} holds weights and plan of a {cls}, which is your code and no transformers model. {_BUILT}"
        )
    given = model
    if not isinstance(given, nn.Module) and callable(given):
        given = given()
    if not isinstance(given, nn.Module):
        raise ArgumentTypeError(
            f"model must be the dense {cls}, or a function that builds it; found {type(given).__name__}. {_BUILT}"
        )
    for name, tensor in tensors_of(given).items():
        if tensor.is_meta:
            raise UnsupportedModelError(
                f"{name!r} of the model has no values in memory (device 'meta'). Build the model on a CPU or GPU."
            )
    return given


def _cut_once(dense: nn.Module, path: str, plan: PruningPlan, directory: str) -> Callable[[], None]:
    """Cut the model at a path of the module unless it is cut by this plan already; return a function that undoes it."""
    model = submodule(dense, path)
    before = get_plan(model)
    if before is None:
        return cut(model, plan, root=dense)
    if before.digest() != plan.digest():
        raise PlanError(
            f"The model given is cut by another plan ({before.digest()[:12]}) than the one in {directory}"
            f" ({plan.digest()[:12]}). {_BUILT}"
        )
    return lambda: None


def _check_headers(
    module: nn.Module,
    directory: str,
    headers: Mapping[str, tuple[str, tuple[int, ...]]],
    ties: Mapping[str, str],
) -> None:
    """Refuse weights that are not all those of a module that is cut, in its shapes.

    Raises:
        PlanError: Naming a tensor and both shapes.
        PruningError: If weights are missing, or unknown.
    """
    state = module.state_dict()
    places = {**{name: name for name in headers}, **ties}
    missing, unknown = sorted(state.keys() - places.keys()), sorted(places.keys() - state.keys())
    for what, names in (("lacks the weights", missing), ("has unknown weights", unknown)):
        if names:
            raise PruningError(
                f"{directory} {what} {names[:3]} ({len(names)} tensors) for this {type(module).__name__}: it is not built as"
                f" the model that was pruned. {_BUILT}"
            )
    for name, place in places.items():
        found, expected = headers[place][1] if place in headers else None, tuple(state[name].shape)
        if found != expected:
            raise PlanError(
                f"The weights in {directory} do not fit the model: {name!r} has shape {found} in the files, and {expected} in"
                f" this {type(module).__name__} once it is cut. {_BUILT}"
            )


def _fill(
    module: nn.Module,
    values: Mapping[str, Tensor],
    ties: Mapping[str, str],
    dtype: torch.dtype | str,
    directory: str,
) -> None:
    """Load weights that are known to fit.

    Raises:
        PruningError: If a parameter has values that are not finite.
    """
    state = {**values, **{name: values[place] for name, place in ties.items()}}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point() and not bool(torch.isfinite(state.get(name, parameter)).all()):
            raise PruningError(f"The weights in {directory} are damaged: {name!r} has values that are not finite.")
    with torch.no_grad():
        for name, tensor in tensors_of(module).items():
            if name in state and tensor.is_floating_point():
                tensor.data = tensor.data.to(state[name].dtype if dtype == "auto" else dtype)
    separate(module, state)
    module.load_state_dict(state, strict=True)


def _read(directory: str, files: list[str]) -> dict[str, Tensor]:
    values = {}
    for file in files:
        try:
            with safe_open(file, "pt") as content:
                values.update({name: content.get_tensor(name) for name in content.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise PruningError(f"The weights in {directory} are damaged: {Path(file).name}: {error}.") from error
    return values
