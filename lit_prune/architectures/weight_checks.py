"""Checks, before any calibration, that the weights of the groups are in memory and shared with nothing beside the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lit_prune.distributed import shards
from lit_prune.errors import UnsupportedModelError
from lit_prune.groups import GroupSet, check_names
from lit_prune.torch_internals import TABLES, tables
from lit_prune.transformers_internals import accelerate_hook


def check_parameters(model: nn.Module, group_sets: Sequence[GroupSet], root: nn.Module | None = None) -> None:
    """Refuse weights that are not in memory, or that a module beside the model holds, too.

    Args:
        model: The model.
        group_sets: Its group sets.
        root: The module that holds the model, whose other modules are searched.

    Raises:
        UnsupportedModelError: With what was found at which module, and what to do first.
    """
    check_names(model, group_sets)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedModelError(
                f"{name!r} has no values in memory (it is on the device 'meta'){_offloaded_by(model, name)}. Load the whole model"
                " onto a CPU or GPU, without offloading (device_map=None, low enough precision to fit), before pruning."
            )
    _check_beside(model, group_sets, model if root is None else root)


def _offloaded_by(model: nn.Module, name: str) -> str:
    owner = name.rpartition(".")[0]
    while True:
        hook = accelerate_hook(model.get_submodule(owner))
        if hook is not None:
            return f": accelerate's {type(hook).__name__} at {owner or '(root)'!r} offloads it"
        if not owner:
            return ""
        owner = owner.rpartition(".")[0]


def _check_beside(model: nn.Module, group_sets: Sequence[GroupSet], root: nn.Module) -> None:
    for name, key, path, module in shared_beside(root, model, [s.parameter for g in group_sets for s in g.slices]):
        raise UnsupportedModelError(
            f"{name!r} shares its values with {key!r} of {path or '(root)'} ({type(module).__name__}): cutting one would"
            " break the tie, or the other module. Untie them first: give one of them"
            " nn.Parameter(weight.detach().clone())."
        )


def shared_beside(root: nn.Module, model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, str, str, nn.Module]]:
    """Find parameters of a model that a module beside it holds, too, as the same parameter or at the same memory.

    Args:
        root: The module that holds the model; modules that it holds as plain attributes are searched as well.
        model: The model.
        names: Names of the model's parameters to look for.

    Returns:
        The parameter's name, its name in the other module, and that module's path and the module itself.
    """
    parameters = {name: model.get_parameter(name) for name in names}
    by_identity = {id(p): name for name, p in parameters.items()}
    by_address = {address: name for name, p in parameters.items() if (address := _address(p))}
    inside = {id(module) for module in model.modules()}
    for path, module in _reachable(root):
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = by_identity.get(id(parameter)) if id(module) not in inside else None
            if id(parameter) not in by_identity:
                name = by_address.get(_address(parameter))
            if name is not None:
                yield name, key, path, module


def _address(parameter: Tensor) -> int:
    """Where the values start in memory; 0 if they are nowhere, or spread over processes."""
    if parameter.is_meta or shards.is_sharded(parameter) or not parameter.numel():
        return 0
    return parameter.data_ptr()


def _reachable(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The module, its submodules, and modules that they hold as plain attributes, also in lists and dictionaries."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any, int]] = [("", root, 0)]
    while waiting:
        path, value, depth = waiting.pop()
        if isinstance(value, nn.Module):
            if id(value) in seen:
                continue
            seen.add(id(value))
            yield path, value
            children: Iterable[tuple[Any, Any]] = [*tables(value)[2].items(), *vars(value).items()]
            children = [(k, v) for k, v in children if k not in TABLES]
            depth = 0
        elif isinstance(value, Mapping) and depth < 3:
            children = value.items()
        elif isinstance(value, list | tuple | set) and depth < 3:
            children = enumerate(value)
        else:
            continue
        waiting += [
            (f"{path}.{k}" if path else str(k), v, depth + 1)
            for k, v in children
            if isinstance(v, nn.Module | Mapping | list | tuple | set)
        ]
