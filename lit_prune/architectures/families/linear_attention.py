"""Hybrids of linear attention with full attention whose descriptions are not those of plain decoders."""

from __future__ import annotations

from dataclasses import replace

from lit_prune.architectures.components import MLP, Attention
from lit_prune.architectures.families.experts import ExpertChannels
from lit_prune.architectures.families.mixers import GATED_DELTA_NET, KIMI_DELTA_ATTENTION
from lit_prune.architectures.registry import Architecture, register_architecture

# linear attention has separate projections; the norms of queries and keys of full attention are over all heads
register_architecture(
    Architecture(
        name="olmo-hybrid",
        models=("transformers.OlmoHybridPreTrainedModel",),
        components=(
            replace(
                GATED_DELTA_NET,
                produced={
                    "q_proj": ("key",),
                    "k_proj": ("key",),
                    "v_proj": ("value",),
                    "g_proj": ("value",),
                    "a_proj": ("value_head",),
                    "b_proj": ("value_head",),
                },
                output="o_proj",
            ),
            Attention(
                path="layers.*.self_attn",
                parameters={"q_norm.weight": "query_features", "k_norm.weight": "key_value_features"},
                skippable=True,
                optional=True,
            ),
            MLP(path="layers.*.mlp"),
        ),
        depth=("config.num_hidden_layers", "config.layer_types"),
    )
)

# full attention is by latent keys and values, and stays whole; so do experts: the router's correction of their scores is a
# buffer with an entry for each
for _name, _models, _linear_attention in (
    (
        "kimi-linear",
        ("transformers.KimiLinearPreTrainedModel",),
        replace(
            KIMI_DELTA_ATTENTION,
            produced={
                **KIMI_DELTA_ATTENTION.produced,
                "g_b_proj": ("value",),
                "forget_gate.f_b_proj": ("value",),
            },
            dims={"forget_gate.A_log": 2},
        ),
    ),
    (
        "bailing-hybrid",
        ("transformers.BailingHybridPreTrainedModel",),
        replace(
            KIMI_DELTA_ATTENTION,
            produced={
                **KIMI_DELTA_ATTENTION.produced,
                "g_proj": ("value",),
                "forget_gate.f_proj": ("value",),
            },
        ),
    ),
):
    register_architecture(
        Architecture(
            name=_name,
            models=_models,
            components=(
                _linear_attention,
                MLP(path="layers.*.mlp", requires="gate_proj", optional=True),
                MLP(path="layers.*.mlp.shared_experts", optional=True),
                ExpertChannels(path="layers.*.mlp.experts", optional=True),
            ),
            depth=("config.num_hidden_layers", "config.layer_types", "config.mlp_layer_types"),
        )
    )
