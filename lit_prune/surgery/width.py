"""What a model says of its hidden size, in step with its hidden channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lit_prune.architectures.registry import stream_of
from lit_prune.groups import HIDDEN
from lit_prune.modeling_pruned import change_config
from lit_prune.plan import DEPTH_ATTRIBUTE, PlanEntry, PruningPlan
from lit_prune.surgery.depth import _set_attribute


def hidden_entry(plan: PruningPlan) -> PlanEntry | None:
    """What a plan says of the hidden channels, ``None`` if they all stay."""
    return next((e for e in plan.entries if e.kind == HIDDEN), None)


def width_fields(model: nn.Module, entry: PlanEntry) -> dict[str, Any]:
    """The fields of a model's config that hold its hidden size, before channels leave.

    Args:
        model: The model.
        entry: What the plan says of the hidden channels.

    Returns:
        Their values by name.
    """
    stream, config = stream_of(model), getattr(model, "config", None)
    known = getattr(config, "attribute_map", {})
    names = dict.fromkeys(known.get(name, name) for name in (() if stream is None else stream.fields))
    return {name: entry.size for name in names if getattr(config, name, None) == entry.size}


def head_size(model: nn.Module) -> dict[str, int]:
    """The size of a head, by the name of its field, where the config holds none: it would follow from the hidden size."""
    if getattr(getattr(model, "config", None), "head_dim", None) is not None:
        return {}
    sizes = (getattr(module, "head_dim", None) for module in model.modules())
    size = next((s for s in sizes if isinstance(s, int)), None)
    return {} if size is None else {"head_dim": size}


def narrow_config(model: nn.Module, plan: PruningPlan, journal: list[Callable[[], None]]) -> None:
    """Give a model whose hidden channels were cut a copy of its config with the new hidden size."""
    entry = hidden_entry(plan)
    if entry is None or not (fields := width_fields(model, entry)):
        return
    # rotary embeddings read the size of a head from the config once more when a model is loaded
    journal.append(change_config(model, {**head_size(model), **dict.fromkeys(fields, len(entry.kept))}))
    _set_attribute(model, DEPTH_ATTRIBUTE, {**fields, **getattr(model, DEPTH_ATTRIBUTE, {})}, journal)
