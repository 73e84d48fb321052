"""The mixers that several families have in common: state-space models, gated delta rules, short convolutions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from lit_prune.architectures.sequence_mixers import SequenceMixer


def _one_channel(_: nn.Module) -> dict[str, int]:
    return {"value": 1}


# one channel of the inner width; B, C and the time step are projections of all channels
MAMBA = SequenceMixer(
    path="layers.*.mixer",
    kind="ssm_channel",
    widths=_one_channel,
    produced={"in_proj": ("value", "value")},
    parameters={
        "conv1d.weight": ("value",),
        "conv1d.bias": ("value",),
        "dt_proj.weight": ("value",),
        "dt_proj.bias": ("value",),
        "A_log": ("value",),
        "D": ("value",),
    },
    read={"x_proj": ("value",)},
    attributes={"intermediate_size": ("value",)},
    aligned=("in_proj", "conv1d.weight"),
)


def _mamba2_widths(module: Any) -> dict[str, int]:
    return {"value": module.head_dim, "head": 1}


def _mamba2_shared(module: Any) -> dict[str, int]:
    return {"states": 2 * module.n_groups * module.ssm_state_size}


# one head; those that share B and C, and a norm, are a part. After a cut the norms count the heads that stay
MAMBA2 = SequenceMixer(
    path="layers.*.mixer",
    kind="ssm_head",
    widths=_mamba2_widths,
    shared=_mamba2_shared,
    produced={"in_proj": ("value", "value", "states", "head")},
    parameters={
        "conv1d.weight": ("value", "states"),
        "conv1d.bias": ("value", "states"),
        "dt_bias": ("head",),
        "A_log": ("head",),
        "D": ("head",),
        "norm.weight": ("value",),
    },
    attributes={
        "num_heads": ("head",),
        "intermediate_size": ("value",),
        "conv_dim": ("value", "states"),
    },
    parts="n_groups",
    part_attributes={"norm.group_size": ("value",)},
    aligned=("in_proj", "conv1d.weight"),
)


def _delta_widths(module: Any) -> dict[str, int]:
    heads = module.num_v_heads // module.num_k_heads
    value = heads * module.head_v_dim
    return {
        "key": module.head_k_dim,
        "value": value,
        "key_head": 1,
        "value_head": heads,
        "qkvz": 2 * module.head_k_dim + 2 * value,
        "ba": 2 * heads,
    }


# one key head with the value heads that share it; the norm is over each head
_DELTA = SequenceMixer(
    path="layers.*.linear_attn",
    kind="linear_attention",
    widths=_delta_widths,
    produced={},
    parameters={
        "conv1d.weight": ("key", "key", "value"),
        "A_log": ("value_head",),
        "dt_bias": ("value_head",),
    },
    attributes={
        "num_k_heads": ("key_head",),
        "num_v_heads": ("value_head",),
        "key_dim": ("key",),
        "value_dim": ("value",),
        "conv_dim": ("key", "key", "value"),
    },
    optional=True,
)
GATED_DELTA_NET = replace(
    _DELTA,
    produced={
        "in_proj_qkv": ("key", "key", "value"),
        "in_proj_z": ("value",),
        "in_proj_b": ("value_head",),
        "in_proj_a": ("value_head",),
    },
)
# the rows of each key head lie together
FUSED_GATED_DELTA_NET = replace(_DELTA, produced={"in_proj_qkvz": ("qkvz",), "in_proj_ba": ("ba",)})

SHORT_CONVOLUTION = SequenceMixer(
    path="layers.*.conv",
    kind="convolution_channel",
    widths=_one_channel,
    produced={"in_proj": ("value", "value", "value")},
    parameters={"conv.weight": ("value",), "conv.bias": ("value",)},
    aligned=("conv.weight",),
    optional=True,
)


def _zamba_widths(module: Any) -> dict[str, int]:
    return {"value": module.mamba_head_dim, "value_and_gate": 2 * module.mamba_head_dim, "head": 1}


ZAMBA_MIXER = SequenceMixer(
    path="layers.*.mamba",
    kind="ssm_head",
    widths=_zamba_widths,
    produced={"in_proj": ("value_and_gate",)},
    parameters={
        "conv1d.weight": ("value",),
        "conv1d.bias": ("value",),
        "x_proj_weight": ("head",),
        "dt_proj_weight": ("head",),
        "dt_proj_bias": ("head",),
        "A_log": ("head",),
        "D": ("head",),
    },
    attributes={"n_mamba_heads": ("head",), "intermediate_size": ("value",)},
    aligned=("in_proj", "conv1d.weight"),
)


def _kimi_widths(module: Any) -> dict[str, int]:
    return {"value": module.head_dim, "head": 1}


# decays are for every feature of a head; the norm is over each head
KIMI_DELTA_ATTENTION = SequenceMixer(
    path="layers.*.self_attn",
    kind="linear_attention",
    widths=_kimi_widths,
    produced={"q_proj": ("value",), "k_proj": ("value",), "v_proj": ("value",), "b_proj": ("head",)},
    parameters={
        "conv1d.weight": ("value", "value", "value"),
        "forget_gate.dt_bias": ("value",),
        "forget_gate.A_log": ("head",),
    },
    output="o_proj",
    attributes={
        "num_heads": ("head",),
        "qkv_dim": ("value",),
        "conv_dim": ("value", "value", "value"),
        "forget_gate.num_heads": ("head",),
        "forget_gate.qkv_dim": ("value",),
    },
    requires="forget_gate",
    optional=True,
)
