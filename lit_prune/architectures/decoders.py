"""Decoders with separate query, key, value and output projections."""

from lit_prune.architectures.base import MLP, Architecture, Attention, register_architecture

register_architecture(
    Architecture(
        name="llama",
        models=(
            "LlamaPreTrainedModel",
            "MistralPreTrainedModel",
            "Qwen2PreTrainedModel",
            "Qwen3PreTrainedModel",
            "GemmaPreTrainedModel",
            "Gemma2PreTrainedModel",
            "Gemma3PreTrainedModel",
            "SmolLM3PreTrainedModel",
        ),
        blocks=(
            Attention(path="layers.*.self_attn", skippable=True),
            MLP(path="layers.*.mlp"),
        ),
        depth=("config.num_hidden_layers", "config.layer_types", "config.no_rope_layers"),
    )
)

# the norms of queries and keys are over all heads: after a cut, over those that stay
register_architecture(
    Architecture(
        name="olmo2",
        models=("Olmo2PreTrainedModel", "Olmo3PreTrainedModel"),
        blocks=(
            Attention(
                path="layers.*.self_attn",
                parameters={"q_norm.weight": "query_features", "k_norm.weight": "key_value_features"},
                skippable=True,
            ),
            MLP(path="layers.*.mlp"),
        ),
        depth=("config.num_hidden_layers", "config.layer_types"),
    )
)

register_architecture(
    Architecture(
        name="opt",
        models=("OPTPreTrainedModel",),
        blocks=(
            Attention(path="layers.*.self_attn", output="out_proj", skippable=True),
            MLP(path="layers.*", inputs=("fc1",), output="fc2"),
        ),
        depth=("config.num_hidden_layers",),
    )
)
