"""Building blocks of descriptions: slices of projections, and group sets made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_prune.architectures.adaptations import without_inputs
from lit_prune.architectures.plain_modules import check_plain
from lit_prune.errors import UnsupportedModelError
from lit_prune.groups import Adaptation, Attribute, GroupSet, Slice, group_cost

STACKED = "stacked"


INTERLEAVED = "interleaved"


def _has(model: nn.Module, name: str) -> bool:
    owner, _, last = name.rpartition(".")
    try:
        return getattr(model.get_submodule(owner), last, None) is not None
    except AttributeError:
        return False


def part_rows(width: int, parts: int, layout: str) -> Tensor:
    """The rows of each channel where ``parts`` rows belong to one, shape ``(width, parts)``."""
    rows = torch.arange(width * parts)
    return rows.view(parts, width).T.contiguous() if layout == STACKED else rows.view(width, parts)


def _check_layout(layout: str) -> None:
    if layout not in (STACKED, INTERLEAVED):
        raise ValueError(f"Unknown layout {layout!r}; expected {STACKED!r} or {INTERLEAVED!r}.")


@dataclass(frozen=True)
class Projection:
    """The shape of a linear projection, whichever way round its weight is stored."""

    in_features: int
    out_features: int
    input_dim: int
    has_bias: bool


def projection(model: nn.Module, owner: str, name: str) -> Projection:
    """The shape of the projection ``name`` within the module ``owner``.

    Raises:
        UnsupportedModelError: If it is missing, carries an adapter, or is not a linear projection.
    """
    path = _joined(owner, name)
    try:
        module = model.get_submodule(path)
    except AttributeError:
        parent = model.get_submodule(owner)
        children = [child for child, _ in parent.named_children()]
        raise UnsupportedModelError(
            f"{owner} ({type(parent).__name__}) was expected to have a projection {name!r}; it has {children}."
        ) from None
    if any("lora" in child for child, _ in module.named_children()):
        raise UnsupportedModelError(
            f"{path} ({type(module).__name__}) carries a LoRA adapter. Merge it first (model.merge_and_unload()), prune,"
            " and add a new adapter to the pruned model."
        )
    check_plain(module, path)
    weight = getattr(module, "weight", None)
    # transformers' Conv1D stores (in, out); nn.Linear stores (out, in)
    transposed = isinstance(module, Conv1D)
    if (not isinstance(module, nn.Linear) and not transposed) or not isinstance(weight, Tensor):
        raise UnsupportedModelError(
            f"{path} is a {type(module).__name__}; expected nn.Linear or transformers' Conv1D. Quantised and wrapped"
            " projections cannot be pruned: load the model in float32, bfloat16 or float16 and without adapters."
        )
    if not isinstance(weight, nn.Parameter):
        raise UnsupportedModelError(
            f"{path}.weight ({type(module).__name__}) is no nn.Parameter but computed from others; expected a parameter. Put a"
            " plain nn.Linear with the computed weight in its place before pruning."
        )
    if weight.dim() != 2:
        raise UnsupportedModelError(
            f"{path}.weight has shape {tuple(weight.shape)} and type {weight.dtype}; expected a matrix. Packed quantised"
            " weights cannot be pruned: load the model without a quantization_config."
        )
    rows, columns = weight.shape
    has_bias = getattr(module, "bias", None) is not None
    return Projection(rows, columns, 0, has_bias) if transposed else Projection(columns, rows, 1, has_bias)


def _joined(owner: str, name: str) -> str:
    """The qualified name of a part of a module, which may be the model itself."""
    return f"{owner}.{name}" if owner else name


def produced(model: nn.Module, owner: str, name: str, rows: Tensor) -> Iterator[Slice]:
    """The slices of a projection whose outputs belong to the groups: weight rows and biases."""
    found = projection(model, owner, name)
    path = _joined(owner, name)
    yield Slice(f"{path}.weight", 1 - found.input_dim, rows, found.input_dim)
    if found.has_bias:
        yield Slice(f"{path}.bias", 0, rows)


def consumed(model: nn.Module, owner: str, name: str, columns: Tensor) -> Slice:
    """The slice of a projection whose inputs belong to the groups. Its bias belongs to none of them."""
    found = projection(model, owner, name)
    return Slice(f"{_joined(owner, name)}.weight", found.input_dim, columns, found.input_dim)


def reader_adaptations(model: nn.Module, owner: str, name: str) -> Iterator[Adaptation]:
    """What the projection that reads the groups needs once there are none."""
    if projection(model, owner, name).input_dim == 0:
        yield Adaptation(f"{owner}.{name}", without_inputs)


def parameter_of(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of that name.

    Raises:
        UnsupportedModelError: If there is none; the message names the module that should have it.
    """
    owner, _, last = name.rpartition(".")
    while True:
        try:
            module = model.get_submodule(owner)
            break
        except AttributeError:
            owner = owner.rpartition(".")[0]
    check_plain(module, owner)
    parameter = getattr(module, last, None) if name == f"{owner}.{last}" else None
    if not isinstance(parameter, nn.Parameter):
        parts = [n for n, _ in (*module.named_children(), *module.named_parameters(recurse=False))]
        raise UnsupportedModelError(
            f"{owner} ({type(module).__name__}) was expected to hold the parameter {name.removeprefix(owner + '.')!r}; it has"
            f" {parts}."
        )
    return parameter


def part_of(
    model: nn.Module, name: str, dim: int, index: Tensor, input_dim: int | None = None, unobservable_input: bool = False
) -> Slice:
    """A slice of a parameter, checked against the parameter's shape.

    Raises:
        UnsupportedModelError: If there is no such parameter, or its dimension is not what the index covers.
    """
    parameter = parameter_of(model, name)
    if parameter.dim() <= dim or parameter.shape[dim] != index.numel():
        raise UnsupportedModelError(
            f"{name!r} has shape {tuple(parameter.shape)}; expected {index.numel()} entries along dimension {dim}."
        )
    return Slice(name, dim, index, input_dim, unobservable_input)


def group_set_of(
    model: nn.Module,
    name: str,
    layer: int,
    kind: str,
    slices: tuple[Slice, ...],
    attributes: Mapping[str, str],
    counts: Mapping[str, int],
    owner: str | None = None,
) -> GroupSet:
    """A group set with its cost, and those of the attributes that are there and counted; they are the module ``owner``'s."""
    owner = name if owner is None else owner
    present = []
    for attribute, counted in attributes.items():
        path, _, last = attribute.rpartition(".") if not attribute.startswith("config.") else ("", "", attribute)
        module_name = f"{owner}.{path}" if path else owner
        there = last.startswith("config.") or hasattr(model.get_submodule(module_name), last)
        if there and counted in counts:
            present.append(Attribute(module_name, last, counts[counted]))
    size = len(slices[0].index)
    return GroupSet(name, layer, kind, size, group_cost(model, slices) if size else 0, slices, tuple(present))
