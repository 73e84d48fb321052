"""Llama and the families that share its layer: separate q, k, v and o projections and a gated MLP."""

from lit_prune.architectures.base import MLP, Architecture, Attention, register_architecture

register_architecture(
    Architecture(
        name="llama",
        models=(
            "LlamaPreTrainedModel",
            "MistralPreTrainedModel",
            "Qwen2PreTrainedModel",
            "Qwen3PreTrainedModel",
        ),
        blocks=(
            Attention(path="layers.*.self_attn"),
            MLP(path="layers.*.mlp"),
        ),
    )
)
