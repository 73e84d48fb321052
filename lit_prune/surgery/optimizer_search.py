"""Every optimizer that holds a model's parameters: those given, those inside them, those that modules and hooks hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_prune.errors import OptimizerStateError
from lit_prune.surgery.references import attributes, held_by, items, parameter_hooks


def find_optimizers(given: Iterable[Any], holder: nn.Module | None = None) -> list[Any]:
    """All optimizers that can be reached, each once.

    Args:
        given: Optimizers. What they wrap is found through their attributes, and containers of them.
        holder: A module whose submodules may hold optimizers as attributes, and whose parameters' hooks may hold some (an
            optimizer for every parameter, stepped within the backward pass).
    """
    found: dict[int, Any] = {}
    queue = list(given)
    if holder is not None:
        queue += _held(holder)
    while queue:
        optimizer = queue.pop(0)
        if id(optimizer) not in found:
            found[id(optimizer)] = optimizer
            queue += _inside(optimizer)
    return list(found.values())


def is_optimizer(value: Any) -> bool:
    """Whether something is an optimizer, or wraps one and behaves like it."""
    if isinstance(value, Optimizer):
        return True
    if isinstance(value, (Tensor, nn.Module, type)) or not hasattr(value, "__dict__"):
        return False
    return isinstance(getattr(value, "param_groups", None), list) and hasattr(value, "state")


def _inside(owner: Any) -> Iterator[Any]:
    for _, value in attributes(owner):
        yield from (item for item in items(value) if is_optimizer(item))


def _held(holder: nn.Module) -> Iterator[Any]:
    for module in holder.modules():
        yield from _inside(module)
    for parameter in holder.parameters():
        for hook in parameter_hooks(parameter):
            for _, value in held_by(hook):
                yield from (item for item in items(value) if is_optimizer(item))


def param_groups(optimizers: Iterable[Any]) -> list[dict[str, Any]]:
    """The parameter groups of optimizers, each list of parameters once: wrappers often share those of what they wrap."""
    groups: dict[int, dict[str, Any]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            groups.setdefault(id(group["params"]), group)
    return list(groups.values())


def states(optimizer: Any) -> Iterator[tuple[str, MutableMapping[Any, Any]]]:
    """The mappings from parameters (or their ids) to state that an optimizer keeps, with the names of the places."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    yield "state", optimizer.state
    yield from _keyed_by_parameter(optimizer.state, "state", known)
    for name, value in attributes(optimizer):
        if isinstance(value, MutableMapping) and value is not optimizer.state and "hook" not in name:
            if _has_parameter_key(value, known):
                yield name, value
            yield from _keyed_by_parameter(value, name, known)


def _keyed_by_parameter(
    mapping: Mapping[Any, Any], name: str, known: set[int]
) -> Iterator[tuple[str, MutableMapping[Any, Any]]]:
    """Such mappings within another one."""
    for key, value in list(mapping.items()):
        if isinstance(key, str) and isinstance(value, MutableMapping) and _has_parameter_key(value, known):
            yield f"{name}[{key!r}]", value


def _has_parameter_key(mapping: Mapping[Any, Any], known: set[int]) -> bool:
    keyed = any(id(key) in known or (isinstance(key, int) and key in known) for key in mapping)
    return keyed and not any(is_optimizer(item) for item in mapping.values())


def key_of(mapping: Mapping[Any, Any], parameter: Tensor) -> Any:
    """What a mapping from :func:`states` has a parameter by: itself, or its id.

    The two must not be looked up in one mapping: they have the same hash, and do not compare.
    """
    return id(parameter) if isinstance(next(iter(mapping), None), int) else parameter


def check_ownership(given: Sequence[Any], root: nn.Module) -> None:
    """Refuse optimizers over parameters of something else than the model that is to be cut.

    Args:
        given: The optimizers.
        root: The module that holds the model.

    Raises:
        OptimizerStateError: If an optimizer trains parameters and none of them is in the module.
        TypeError: If something given is not an optimizer.
    """
    own = {id(p) for p in root.parameters()}
    for optimizer in given:
        if not is_optimizer(optimizer):
            raise TypeError(f"optimizers must hold optimizers; found a {type(optimizer).__name__}.")
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if trained and not any(id(p) in own for p in trained):
            raise OptimizerStateError(
                f"{type(optimizer).__name__} holds {len(trained)} parameters, none of which is in the"
                f" {type(root).__name__} that is to be pruned; expected an optimizer over its parameters. Was it made for"
                " another copy of the model? Make it from the parameters of this one."
            )


def check_new_parameters(model: nn.Module, given: Sequence[Any], found: Sequence[Any]) -> None:
    """Refuse to give the model new parameters where optimizers that step within the backward pass hold its parameters.

    Args:
        model: The model.
        given: The optimizers that the caller steps.
        found: All that can be reached.

    Raises:
        OptimizerStateError: If there is an optimizer that the caller does not step.
    """
    own = {id(p) for p in model.parameters()}
    stepped = {id(p) for group in param_groups(find_optimizers(given)) for p in group["params"]}
    for group in param_groups(found):
        if any(id(p) in own and id(p) not in stepped for p in group["params"]):
            raise OptimizerStateError(
                "repair='bias' gives layers new biases, and the model's parameters are in optimizers that modules or hooks"
                " hold, which would not train them. Use repair='least_squares' or repair=None."
            )


def is_lbfgs(optimizer: Any) -> bool:
    """Whether an optimizer keeps a history over all its parameters in one vector, which a cut can only reset."""
    return isinstance(optimizer, torch.optim.LBFGS)
