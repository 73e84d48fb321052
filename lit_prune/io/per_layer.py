"""``per_layer_config``: how a config of transformers says what single layers of a pruned model have other than the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lit_prune.groups import GroupSet, stack_of
from lit_prune.io.stock import WIDTHS, of_all_layers, same_settings
from lit_prune.modeling_pruned import (
    LAYERS,
    PrunedModelError,
    build_layers,
    layer_overrides,
    named_configs,
    same_in_all_layers,
    stated_layers,
)
from lit_prune.plan import PruningPlan
from lit_prune.transformers_internals import build, without_layer_warnings

LIFTED = "allow_global_per_layer_attribute_access"


def add_layers(fields: dict[str, Any], dense: nn.Module, group_sets: Sequence[GroupSet], plan: PruningPlan) -> bool:
    """Add to the fields of a config what a plan leaves in single layers, as far as a config can say it.

    Args:
        fields: The content of ``config.json``; changed in place.
        dense: The dense model.
        group_sets: Its group sets.
        plan: What is cut from it.

    Returns:
        Whether anything was added. Nothing is if this transformers knows no layers that differ.
    """
    if not hasattr(PreTrainedConfig, LAYERS):
        return False
    configs = dict(named_configs(dense.config))
    new_index = {e.name: {old: new for new, old in enumerate(e.kept)} for e in plan.blocks}
    entries = {e.key: e for e in plan.group_entries}
    cut: dict[str, dict[int, dict[str, Any]]] = {}
    for group_set in group_sets:
        entry = entries.get(group_set.key)
        place = _place(dense, group_set, configs)
        if entry is None or place is None or group_set.kind not in WIDTHS:
            continue
        path, stack, old = place
        if group_set.kind == "attention" and not _states_head_dim(_inside(fields, path), configs[path]):
            continue
        share = Fraction(len(entry.kept), entry.size)
        values: dict[str, Any] = widths_of_layer(configs[path], old, group_set.kind, share)
        if group_set.kind == "attention" and not share:
            values = {"skip": ["attention"]}
        cut.setdefault(path, {}).setdefault(new_index.get(stack, {}).get(old, old), {}).update(values)
    for path, overrides in cut.items():
        inner = _inside(fields, path)
        own = _own_layers(configs[path], new_index, dense, path)
        merged = {i: {**own.get(i, {}), **overrides.get(i, {})} for i in sorted({*own, *overrides})}
        inner[LAYERS] = {str(index): values for index, values in merged.items()}
        if path:
            # it is built by the model's own config class, and then read by code of ours
            inner[LIFTED] = True
    return bool(cut)


def _inside(fields: dict[str, Any], path: str) -> dict[str, Any]:
    for name in path.split(".") if path else ():
        fields = fields[name]
    return fields


def restore_layers(fields: dict[str, Any], path: str, own: Mapping[Any, Mapping[str, Any]] | None) -> None:
    """Make the fields of a pruned model's config say of single layers what the dense model's do; changes them in place.

    Args:
        fields: The content of ``config.json``.
        path: Which of the configs in it, ``""`` for itself.
        own: What the dense model's config says of single layers, by index.
    """
    inner = _inside(fields, path)
    inner.pop(LIFTED, None)
    inner.pop(LAYERS, None)
    if own:
        inner[LAYERS] = {str(index): dict(values) for index, values in own.items()}


def _place(dense: nn.Module, group_set: GroupSet, configs: Mapping[str, Any]) -> tuple[str, str, int] | None:
    """The config of the stack of layers that a group set is in, by name, the stack, and the layer's position there."""
    if not group_set.block:
        return None
    stack, index = stack_of(group_set.block)
    holder = stack
    while holder:
        holder = holder.rpartition(".")[0]
        held = getattr(dense.get_submodule(holder), "config", None)
        for path, config in configs.items():
            if held is config:
                return path, stack, index
    return None


def widths_of_layer(config: PreTrainedConfig, index: int, kind: str, share: Fraction) -> dict[str, int]:
    """The fields of a config that say how wide a layer is, and what they become when a share of its groups stays.

    Args:
        config: The dense model's config.
        index: The layer's position.
        kind: The kind of the groups.
        share: Kept groups, as a share of those that there were.
    """
    layer = config.per_layer_config[index]
    found = {}
    for name in WIDTHS[kind]:
        value = getattr(layer, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            found[config.attribute_map.get(name, name)] = int(value * share)
    return found


def _states_head_dim(fields: dict[str, Any], config: Any) -> bool:
    """Say the size of a head, which no longer follows from the number of heads; whether a config can."""
    name = config.attribute_map.get("head_dim", "head_dim")
    if isinstance(getattr(type(config), name, None), property):
        return False
    heads, width = of_all_layers(config, "num_attention_heads"), of_all_layers(config, "hidden_size")
    own = name in {field for values in layer_overrides(config).values() for field in values}
    if fields.get(name) is None and not own and isinstance(heads, int) and isinstance(width, int):
        fields[name] = width // heads
    return fields.get(name) is not None


def _own_layers(config: Any, new_index: Mapping[str, Mapping[int, int]], dense: nn.Module, path: str) -> dict[int, Any]:
    """What the dense model's config says of single layers, by the positions that they have now."""
    own = layer_overrides(config)
    for stack, moved in new_index.items():
        holder = dense.get_submodule(stack.rpartition(".")[0])
        if getattr(holder, "config", None) is config:
            own = {moved[index]: values for index, values in own.items() if index in moved}
    return own


def stock_with_layers(
    model: nn.Module,
    base: type[PreTrainedModel],
    config_class: type[PreTrainedConfig],
    fields: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    depth: bool,
) -> dict[str, Any] | None:
    """The fields of a config of the dense model's own type that say all of a pruned model, or ``None`` if none do.

    Whether they do is decided by building the model, each layer from ``config.per_layer_config[i]``: every parameter has to
    come out with the shape that it has, and every module with its class.

    Args:
        model: The pruned model.
        base: The class of the dense model.
        config_class: The class of its config.
        fields: The content of ``config.json``, with ``per_layer_config``.
        shapes: The shape of every tensor of the pruned model.
        depth: Whether layers left, so that settings that follow from a layer's index are compared, too.

    Returns:
        The fields. Config classes that ask themselves for what layers differ in can only be built with a switch that lifts
        transformers' refusal; where that is so, they hold it.
    """
    for lifted in ({}, {LIFTED: True}):
        try:
            with without_layer_warnings():
                config: Any = config_class.from_dict({**fields, **lifted})
        except Exception:  # a config class may refuse the widths in whatever way it likes
            continue
        try:
            with torch.device("meta"):
                built = build(base, same_in_all_layers(config))
                build_layers(built, stated_layers(config))
        except (PrunedModelError, *_NOT_BUILT):
            return None
        found = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
        same = found == dict(shapes) and _same_classes(built, model) and (not depth or same_settings(built, model))
        return {**fields, **lifted} if same else None
    return None


_NOT_BUILT = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def _same_classes(built: nn.Module, model: nn.Module) -> bool:
    """Whether every module but the model itself has the name and the class of its counterpart."""
    found, wanted = dict(built.named_modules()), dict(model.named_modules())
    return found.keys() == wanted.keys() and all(type(m) is type(wanted[n]) for n, m in found.items() if n)
