"""Parameters that are one: as the config of a model says, and as they are in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lit_prune.distributed.shards import is_sharded
from lit_prune.errors import UnsupportedModelError
from lit_prune.modeling_pruned import named_configs

_FIELD = "tie_word_embeddings"


def built_as_tied(
    build: Callable[[], PreTrainedModel], config: PreTrainedConfig, held: Mapping[str, Tensor]
) -> PreTrainedModel:
    """Build a model in which those parameters are one that are one in another model.

    A head that was untied from the embedding, or tied to it, after the model was built differs from what its config says.

    Args:
        build: Builds the model from ``config``.
        config: The config; its ``tie_word_embeddings`` is changed where it says otherwise than the other model is.
        held: The other model's parameters, by their names in the one that is built.

    Raises:
        UnsupportedModelError: If no config can say that some parameters, which have different values, are not one.
    """
    built = build()
    wrong = _wrongly_tied(built, held)
    if not wrong and not untied_names(built, held):
        return built
    before = _tie(config, not wrong)
    other = build()
    if not _wrongly_tied(other, held) and (wrong or not untied_names(other, held)):
        return other
    if wrong:
        raise UnsupportedModelError(
            f"{wrong[:3]} of {type(built).__name__} have values of their own, and no config of it can say so: loaded again, they"
            " would be one tensor. Save the model's state_dict and its plan (lit_prune.get_plan(model).save(path)) yourself."
        )
    for each, value in before:
        setattr(each, _FIELD, value)
    return built


def copy_ties(source: PreTrainedConfig, target: PreTrainedConfig) -> None:
    """Make a config say of ties what another of the same type does."""
    for (_, given), (_, taking) in zip(named_configs(source), named_configs(target), strict=True):
        if hasattr(given, _FIELD):
            setattr(taking, _FIELD, getattr(given, _FIELD))


def untied_names(model: nn.Module, held: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that are one with another in ``held``, and parameters of their own in a model."""
    built = dict(model.named_parameters(remove_duplicate=False))
    found: list[str] = []
    first: dict[Any, str] = {}
    for name, tensor in held.items():
        if name in built and tensor.numel():
            other = first.setdefault(_place(tensor), name)
            if built[other] is not built[name]:
                found.append(name)
    return found


def separate(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Make parameters that are one, and that are to get different values, parameters of their own; in place.

    Args:
        model: The model; its config, if it has one, says so afterwards.
        values: The values by name.
    """
    names = _wrongly_tied(model, values)
    for name in names:
        path, _, attribute = name.rpartition(".")
        parameter = model.get_parameter(name)
        own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(path), attribute, own)
    for module in model.modules() if names else ():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            _tie(config, False)


def _tie(config: Any, value: bool) -> list[tuple[Any, Any]]:
    """Let a config and those in it say whether embeddings are tied; what they said before."""
    configs = [each for _, each in named_configs(config) if hasattr(each, _FIELD)]
    before = [(each, getattr(each, _FIELD)) for each in configs]
    for each in configs:
        setattr(each, _FIELD, value)
    return before


def _wrongly_tied(model: nn.Module, values: Mapping[str, Tensor]) -> list[str]:
    """Names of parameters that are one with an earlier one in a model and have another value than that in ``values``."""
    return [
        name
        for names in _tied(model.named_parameters(remove_duplicate=False))
        for name in names[1:]
        if names[0] in values and name in values and not _same(values[names[0]], values[name])
    ]


def _tied(named: Iterable[tuple[str, nn.Parameter]]) -> list[list[str]]:
    found: dict[int, list[str]] = {}
    for name, parameter in named:
        found.setdefault(id(parameter), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """Where and how the values of a tensor lie, by which two that are one are known."""
    return tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride()


def _place(tensor: Tensor) -> Any:
    """What tensors that are one have in common: they are one object, or have one memory."""
    if isinstance(tensor, nn.Parameter) or is_sharded(tensor) or tensor.is_meta:
        return id(tensor)
    return memory_of(tensor)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values; of shards and of what has no values it is taken for granted."""
    if any(is_sharded(each) or each.is_meta for each in (one, other)) or _place(one) == _place(other):
        return True
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(one, other.to(one.device))
