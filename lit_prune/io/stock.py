"""Stock configs of transformers for pruned models whose layers kept the same widths."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lit_prune.io.conversion import convert_checkpoint as convert_checkpoint
from lit_prune.io.loading import load_pruned as load_pruned
from lit_prune.plan import PruningPlan
from lit_prune.transformers_internals import build

# by kind, the fields that say how many groups there are, or count something for each; those that a config lacks are passed over
WIDTHS = {
    "attention": ("num_attention_heads", "num_key_value_heads"),
    "mlp": (
        "intermediate_size",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "shared_intermediate_size",
    ),
    "linear_attention": ("linear_num_key_heads", "linear_num_value_heads"),
    "ssm_channel": ("expand", "mamba_expand"),
    "ssm_head": (
        "num_heads",
        "mamba_num_heads",
        "mamba_n_heads",
        "n_mamba_heads",
        "mamba_d_ssm",
        "expand",
        "mamba_expand",
    ),
}


def stock_config(
    model: nn.Module,
    base: type[PreTrainedModel],
    dense: PreTrainedConfig,
    plan: PruningPlan,
    shapes: Mapping[str, tuple[int, ...]],
    depth: Mapping[str, Any],
) -> tuple[Any, dict[str, Any]] | None:
    """A stock config with widths and depth of the pruned model and the dense values of what it changes, or ``None``.

    Whether it does is decided by building the model: every parameter has to come out with the shape that it has, and,
    where blocks left, every layer with the settings that it has, some of which may follow from its index.
    """
    fields, changed = dense.to_dict(), dict(depth)
    for kind in dict.fromkeys(e.kind for e in plan.group_entries):
        shares = {Fraction(len(e.kept), e.size) for e in plan.entries if e.kind == kind}
        if len(shares) > 1 or kind not in WIDTHS:
            return None
        share = shares.pop()
        for name in WIDTHS[kind]:
            value = of_all_layers(dense, name)
            if isinstance(value, int):
                changed[dense.attribute_map.get(name, name)] = int(value * share)
    head_dim = of_all_layers(dense, "head_dim")
    if head_dim is not None:
        changed[dense.attribute_map.get("head_dim", "head_dim")] = head_dim
    try:
        config: Any = type(dense).from_dict({**fields, **changed})
        with torch.device("meta"):
            built = build(base, config)
    except Exception:  # a config class may refuse the widths in whatever way it likes
        return None
    if {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()} != dict(shapes):
        return None
    if plan.blocks and not same_settings(built, model):
        return None
    return config, {name: fields[name] for name in changed}


def of_all_layers(config: PreTrainedConfig, name: str) -> Any:
    """The value of a field of a config, ``None`` if it has none or its layers differ in it."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # how transformers answers where layers differ
        return None


def same_settings(built: nn.Module, model: nn.Module) -> bool:
    """Whether every module has the numbers and words (widths of windows, scales, kinds of layers) of its counterpart."""
    for (_, a), (_, b) in zip(built.named_modules(), model.named_modules(), strict=True):
        for name in (a.__dict__.keys() & b.__dict__.keys()) - {"training", "gradient_checkpointing"}:
            value = a.__dict__[name]
            if isinstance(value, (int, float, str)) and not name.startswith("_") and value != b.__dict__[name]:
                return False
    return True
