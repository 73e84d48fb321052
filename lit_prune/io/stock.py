"""Stock configs of transformers for pruned models whose layers kept the same widths."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lit_prune.architectures.norms import scale_offset, stream_norms
from lit_prune.architectures.registry import find_group_sets
from lit_prune.groups import HIDDEN
from lit_prune.io.conversion import convert_checkpoint as convert_checkpoint
from lit_prune.io.loading import load_pruned as load_pruned
from lit_prune.plan import PruningPlan
from lit_prune.surgery.width import hidden_entry
from lit_prune.transformers_internals import build, embedding_scale

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


# fields of the width of MLPs that may be None: four times the hidden size
_IMPLIED = ("n_inner",)


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
    # of the hidden channels the fields are among those given
    for kind in dict.fromkeys(e.kind for e in plan.group_entries if e.kind != HIDDEN):
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
    if hidden_entry(plan) is not None:
        changed.update(_implied_widths(model, dense))
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
    return config, {name: fields[name] for name in changed if name in fields}


def unstated_parts(model: nn.Module, dense: nn.Module, plan: PruningPlan) -> list[str]:
    """Names of what a model has otherwise than its config says: options of its class, such as ``add_pooling_layer``, decide.

    Args:
        model: The pruned model.
        dense: The dense model as its config builds it.
        plan: What was cut.

    Returns:
        Modules that the model has none of, and parameters that the config builds none of, by the names in the dense model.
    """
    modules = {plan.original_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    absent = [
        name
        for name, _ in dense.named_modules()
        if (owner := modules.get(name.rpartition(".")[0])) is not None
        and getattr(owner, name.rpartition(".")[2], owner) is None
    ]
    built = {name for name, _ in dense.named_parameters(remove_duplicate=False)}
    built |= {f"{name}.bias" for name in plan.biases}
    held = (plan.original_name(name) for name, _ in model.named_parameters(remove_duplicate=False))
    return absent + [name for name in held if name not in built]


def _implied_widths(model: nn.Module, dense: PreTrainedConfig) -> dict[str, int]:
    """Widths of MLPs that a config leaves out, as it takes them for a multiple of the hidden size."""
    widths = {s.size for s in find_group_sets(model) if s.kind == "mlp"}
    names = [name for name in _IMPLIED if getattr(dense, name, 0) is None]
    return dict.fromkeys(names, widths.pop()) if len(widths) == 1 else {}


def rescaled_embeddings(model: nn.Module, whole: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make up for an embedding whose scale follows from the hidden size that a stock config says.

    The weights of the embedding take up the quotient of the scales and, where the head is tied to it, those of the last norm
    the reverse.

    Args:
        model: The pruned model.
        whole: The model as the stock config builds it.
        weights: The weights of the pruned model by name.

    Returns:
        The weights that change, by name.
    """
    changed: dict[str, Tensor] = {}
    for name, module in whole.named_modules():
        before, after = (embedding_scale(m) for m in (model.get_submodule(name), module))
        if before is None or after is None or before == after:
            continue
        key = f"{name}.weight"
        changed[key] = (weights[key].double() * (before / after)).to(weights[key].dtype)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is not None and head.weight is model.get_parameter(key):
            changed.update(
                {n: changed[key] for n, p in model.named_parameters(remove_duplicate=False) if p is head.weight}
            )
            norm = stream_norms(model)[-1]
            offset = scale_offset(model.get_submodule(norm))
            scale = (weights[f"{norm}.weight"].double() + offset) * (after / before) - offset
            changed[f"{norm}.weight"] = scale.to(weights[f"{norm}.weight"].dtype)
    return changed


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
