"""What a config of LitGPT can say of a pruned ``litgpt.GPT``, and which field cannot hold what differs between its layers."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lit_prune.errors import PruningError, UnsupportedModelError
from lit_prune.modeling_pruned import ConfigView
from lit_prune.plan import DEPTH_ATTRIBUTE

# the fields of the dense model's config, on a model that was loaded from a stock folder
_DENSE_FIELDS = "_lit_prune_litgpt_config"
_REMEDY = (
    "A config of LitGPT has one value for all layers: prune with uniform=True, or save without stock=True, in the form that"
    " lit_prune.load_pruned reads."
)


def gpt_class(model: nn.Module) -> type[nn.Module] | None:
    """LitGPT's ``GPT``, if a model is one; ``None`` for other models. Nothing is imported."""
    return next((c for c in type(model).__mro__ if (c.__module__, c.__name__) == ("litgpt.model", "GPT")), None)


def import_litgpt(what: str) -> Any:
    """The package.

    Args:
        what: What needs it, for the message.

    Raises:
        PruningError: If it is not installed.
    """
    try:
        return importlib.import_module("litgpt")
    except ImportError as error:
        raise PruningError(
            f"{what} is a model of LitGPT, which cannot be imported ({error}). Install litgpt."
        ) from error


def shared_config(model: nn.Module) -> Any:
    """The config that the layers of a ``litgpt.GPT`` share, without what a cut overrides for one of them."""
    config: Any = model.config
    return config.shared if isinstance(config, ConfigView) else config


def dense_config(model: nn.Module) -> Any:
    """The config of the model as it was before anything was cut."""
    config = shared_config(model)
    noted = getattr(model, _DENSE_FIELDS, None)
    fields = dataclasses.asdict(config) if noted is None else copy.deepcopy(noted)
    if noted is None:
        fields.update(getattr(model, DEPTH_ATTRIBUTE, {}))
    return type(config)(**fields)


def note_dense_config(model: nn.Module, config: Any) -> None:
    """Remember on a model, whose own config is that of the pruned one, the config of the dense one."""
    setattr(model, _DENSE_FIELDS, dataclasses.asdict(config))


def stock_config(model: nn.Module) -> Any:
    """A config from which LitGPT builds a model of exactly these layers and weights.

    Args:
        model: A pruned ``litgpt.GPT``.

    Raises:
        UnsupportedModelError: If no config can say it; the message names the first field that differs between two layers, or
            the first weight that no field describes.
    """
    config = shared_config(model)
    fields = _common(model)
    if config.first_k_dense_replace is not None:
        fields["first_k_dense_replace"] = _leading_dense(model)
    try:
        stock = dataclasses.replace(config, **fields)
        cls = gpt_class(model)
        assert cls is not None
        with torch.device("meta"):
            built = cls(stock)
    except (ArithmeticError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"LitGPT refuses a config with {fields}: {error}. {_REMEDY}") from error
    _check_same(model, built)
    return stock


def _common(model: nn.Module) -> dict[str, int]:
    """The values that all layers have in common, by the name of the field.

    Raises:
        UnsupportedModelError: If two layers differ.
    """
    values: dict[str, int] = {}
    places: dict[str, str] = {}
    for name, block in model.get_submodule("transformer.h").named_children():
        for field, place, value in _settings(block, f"transformer.h.{name}"):
            if values.setdefault(field, value) != value:
                raise UnsupportedModelError(
                    f"No config of LitGPT describes this model: {field} is {values[field]} at {places[field]} and {value} at"
                    f" {place}. {_REMEDY}"
                )
            places.setdefault(field, place)
    shared = values.pop("shared_intermediate_size", None)
    if shared is not None:
        each = values.get("moe_intermediate_size", 0)
        if not each or shared % each:
            raise UnsupportedModelError(
                f"No config of LitGPT describes this model: its shared experts have {shared} channels, which is no multiple of"
                f" moe_intermediate_size, {each}. {_REMEDY}"
            )
        values["n_shared_expert"] = shared // each
    return values


def _settings(block: Any, path: str) -> Iterator[tuple[str, str, int]]:
    """The sizes that a layer has, each with the name of the config's field and the module it is of."""
    for field in ("n_head", "n_query_groups"):
        yield field, f"{path}.attn", getattr(block.attn.config, field)
    if not hasattr(block.mlp, "experts"):
        yield "intermediate_size", f"{path}.mlp", block.mlp.proj.in_features
        return
    for index, expert in enumerate(block.mlp.experts):
        yield "moe_intermediate_size", f"{path}.mlp.experts.{index}", expert.proj.in_features
    if hasattr(block.mlp, "shared_experts"):
        yield "shared_intermediate_size", f"{path}.mlp.shared_experts", block.mlp.shared_experts.proj.in_features


def _leading_dense(model: nn.Module) -> int:
    blocks: Any = model.get_submodule("transformer.h")
    experts = [index for index, block in enumerate(blocks) if hasattr(block.mlp, "experts")]
    return experts[0] if experts else len(blocks)


def _check_same(model: nn.Module, built: nn.Module) -> None:
    """Refuse a model with weights or windows that one built from the config does not have.

    Raises:
        UnsupportedModelError: Naming the first of them.
    """
    found, expected = _shapes(model), _shapes(built)
    for name in (*found, *expected):
        if found.get(name) != expected.get(name):
            raise UnsupportedModelError(
                f"No config of LitGPT describes this model: {name!r} has shape {found.get(name)}, and"
                f" {expected.get(name)} in a model built from the config. {_REMEDY}"
            )
    blocks: Any = zip(model.get_submodule("transformer.h"), built.get_submodule("transformer.h"), strict=True)  # type: ignore[call-overload]
    for index, (own, other) in enumerate(blocks):
        windows = [bool(getattr(b.attn, "apply_sliding_window_attention", False)) for b in (own, other)]
        if windows[0] != windows[1]:
            raise UnsupportedModelError(
                f"No config of LitGPT describes this model: the sliding window of transformer.h.{index} is {windows[0]}, and"
                f" {windows[1]} in a model built from the config. {_REMEDY}"
            )


def _shapes(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
