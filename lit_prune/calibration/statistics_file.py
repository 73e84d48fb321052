"""Statistics as a file: safetensors, with what the tensors are of as JSON, and a check that a model is the one they are of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_prune._files import replacing
from lit_prune.calibration.terms import Term
from lit_prune.distributed import shards
from lit_prune.errors import PlanError, PruningError, UnsupportedModelError
from lit_prune.groups import GroupSet

FORMAT, VERSION = "lit_prune.statistics", 1
# values of a parameter that its fingerprint is made of
_SAMPLE = 64


def term_label(term: Term) -> str:
    """A text by which a term is found again in another process: the path of its function, its statistic and its flags.

    Functions without a name of their own (lambdas, inner functions) are told apart by their code.
    """
    function = term.function
    named = function if hasattr(function, "__qualname__") else type(function)
    path = f"{named.__module__}.{named.__qualname__}"
    code = getattr(function, "__code__", None)
    if "<" in path and code is not None:
        content = repr((code.co_code, code.co_names, [c for c in code.co_consts if not hasattr(c, "co_code")]))
        path += f"#{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    flags = [name for name in ("consumers_only", "per_input", "per_group") if getattr(term, name)]
    return " ".join([path, str(term.statistic), *flags])


def described(model: nn.Module, group_sets: Sequence[GroupSet]) -> list[list[Any]]:
    """Name, kind and size of every group set, and the shape and a fingerprint of each parameter that it holds a part of.

    Raises:
        UnsupportedModelError: If parameters are sharded.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if shards.any_sharded(parameters.values()) is not None:
        raise UnsupportedModelError(
            "The model is sharded: each process holds the statistics of its shards, which no file is written of. Calibrate a"
            " model that is in one place."
        )
    known: dict[str, list[Any]] = {}
    for name in dict.fromkeys(part.parameter for s in group_sets for part in s.slices):
        known[name] = [list(parameters[name].shape), _fingerprint(parameters[name])]
    return [[s.name, s.kind, s.size, {part.parameter: known[part.parameter] for part in s.slices}] for s in group_sets]


def _fingerprint(parameter: Tensor) -> str:
    """A hash of some values, which is the same for weights in float32 and rounded to bfloat16."""
    values = parameter.detach().flatten()[:: max(1, parameter.numel() // _SAMPLE)]
    rounded = values.to(torch.bfloat16).view(torch.int16).cpu().numpy()
    return hashlib.sha256(rounded.tobytes()).hexdigest()[:16]


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> None:
    """Write tensors and plain data, whole or not at all.

    Raises:
        PruningError: If the file cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = {"format": FORMAT, "version": VERSION, **fields}
    with replacing(path) as temporary:
        try:
            save_file(plain, temporary, metadata={FORMAT: json.dumps(content)})
        except SafetensorError as error:
            raise PruningError(f"The statistics could not be written to {path}: {error}.") from error


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the plain data of a file that :func:`write` wrote.

    Raises:
        FileNotFoundError: If there is no file.
        PruningError: If it is damaged, or holds something else.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file {path}; expected statistics that lit_prune.Statistics.save wrote.")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(FORMAT)
            fields = None if text is None else json.loads(text)
            tensors = {name: file.get_tensor(name) for name in file.keys()} if fields else {}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise PruningError(f"{path} is damaged, or is not a safetensors file: {error}.") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise PruningError(f"{path} holds no statistics of lit_prune; expected a file of lit_prune.Statistics.save.")
    if fields.get("version") != VERSION:
        raise PruningError(
            f"{path} holds statistics of version {fields.get('version')}; expected {VERSION}. Calibrate again, or use the"
            " version of lit_prune that wrote it."
        )
    return tensors, fields


def check_model(path: str | os.PathLike[str], found: Any, model: nn.Module, group_sets: Sequence[GroupSet]) -> None:
    """Refuse statistics of other groups, shapes or weights than those of a model.

    Args:
        path: The file, for the message.
        found: What :func:`described` gave when it was written.
        model: The model.
        group_sets: Its group sets.

    Raises:
        PlanError: Naming the first group set or parameter that differs.
    """
    expected = described(model, group_sets)
    if not isinstance(found, list) or len(found) != len(expected):
        count = len(found) if isinstance(found, list) else "no"
        raise PlanError(
            f"{path} holds statistics of {count} group sets; the model has {len(expected)}. They are of another model, or were"
            " made with other limits.blocks."
        )
    for old, new in zip(found, expected, strict=True):
        if old[:3] != new[:3]:
            raise PlanError(
                f"{path} holds statistics of {old[2]} groups {old[1]!r} in {old[0]!r}; the model has {new[2]} groups"
                f" {new[1]!r} in {new[0]!r} there. They are of another model."
            )
        for name, (shape, fingerprint) in new[3].items():
            before = old[3].get(name, [None, None])
            if before[0] != shape:
                raise PlanError(f"{path} was made for {name!r} of shape {before[0]}; the model's has {shape}.")
            if before[1] != fingerprint:
                raise PlanError(
                    f"{path} was made when {name!r} had other values: the statistics are of other weights of this model."
                    " Calibrate again."
                )
