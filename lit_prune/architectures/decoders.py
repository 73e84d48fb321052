"""Decoders with separate query, key, value and output projections."""

from torch import nn

from lit_prune.architectures.base import MLP, Architecture, Attention, register_architecture
from lit_prune.errors import UnsupportedModelError

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
            "GranitePreTrainedModel",
            "OlmoPreTrainedModel",
            "HeliumPreTrainedModel",
            "Exaone4PreTrainedModel",
            "SeedOssPreTrainedModel",
            "Ernie4_5PreTrainedModel",
            "Ministral3PreTrainedModel",
            # of these the towers of images stay whole: their blocks have other names
            "Qwen2VLPreTrainedModel",
            "Qwen2_5_VLPreTrainedModel",
            "Qwen3VLPreTrainedModel",
        ),
        blocks=(
            Attention(path="layers.*.self_attn", skippable=True),
            MLP(path="layers.*.mlp"),
        ),
        depth=("config.num_hidden_layers", "config.layer_types", "config.no_rope_layers"),
    )
)

# the tower of images stays whole
register_architecture(
    Architecture(
        name="gemma3-images",
        models=("Gemma3Model", "Gemma3ForConditionalGeneration", "Gemma3ForSequenceClassification"),
        blocks=(
            Attention(path="language_model.layers.*.self_attn", skippable=True),
            MLP(path="language_model.layers.*.mlp"),
        ),
    )
)

# the scales of the norms of queries and keys have a row a head
register_architecture(
    Architecture(
        name="cohere",
        models=("CoherePreTrainedModel", "Cohere2PreTrainedModel"),
        blocks=(
            Attention(
                path="layers.*.self_attn",
                parameters={"q_norm.weight": "query_heads", "k_norm.weight": "key_value_heads"},
                skippable=True,
            ),
            MLP(path="layers.*.mlp"),
        ),
        depth=("config.num_hidden_layers", "config.layer_types"),
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

# a gate lies behind each head's query; layers of linear attention stay whole
register_architecture(
    Architecture(
        name="qwen3.5",
        models=("Qwen3_5PreTrainedModel",),
        blocks=(
            Attention(path="layers.*.self_attn", query_parts=2, skippable=True),
            MLP(path="layers.*.mlp"),
        ),
        depth=("config.num_hidden_layers", "config.layer_types"),
    )
)

# its layers share keys and values, so that heads cannot leave one by itself
register_architecture(
    Architecture(
        name="gemma4",
        models=("Gemma4ForCausalLM", "Gemma4TextModel"),
        blocks=(MLP(path="layers.*.mlp"),),
    )
)

register_architecture(
    Architecture(
        name="glm",
        models=("GlmPreTrainedModel", "Glm4PreTrainedModel"),
        blocks=(
            Attention(path="layers.*.self_attn", skippable=True),
            MLP(path="layers.*.mlp", inputs=("gate_up_proj",), parts=2),
        ),
        depth=("config.num_hidden_layers",),
    )
)

register_architecture(
    Architecture(
        name="nemotron",
        models=("NemotronPreTrainedModel", "ArceePreTrainedModel", "ApertusPreTrainedModel"),
        blocks=(
            Attention(path="layers.*.self_attn", skippable=True),
            MLP(path="layers.*.mlp", inputs=("up_proj",)),
        ),
        depth=("config.num_hidden_layers",),
    )
)

register_architecture(
    Architecture(
        name="starcoder2",
        models=("Starcoder2PreTrainedModel",),
        blocks=(
            Attention(path="layers.*.self_attn", skippable=True),
            MLP(path="layers.*.mlp", inputs=("c_fc",), output="c_proj"),
        ),
        depth=("config.num_hidden_layers",),
    )
)


def _check_stablelm(model: nn.Module) -> None:
    if getattr(getattr(model, "config", None), "qk_layernorm", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} has a norm of its own for every head (config.qk_layernorm is True), which the description"
            " does not cover; expected a model without them."
        )


register_architecture(
    Architecture(
        name="stablelm",
        models=("StableLmPreTrainedModel",),
        blocks=(Attention(path="layers.*.self_attn", skippable=True), MLP(path="layers.*.mlp")),
        check=_check_stablelm,
        depth=("config.num_hidden_layers",),
    )
)

register_architecture(
    Architecture(
        name="phi",
        models=("PhiPreTrainedModel",),
        blocks=(
            Attention(path="layers.*.self_attn", output="dense", skippable=True),
            MLP(path="layers.*.mlp", inputs=("fc1",), output="fc2"),
        ),
        depth=("config.num_hidden_layers",),
    )
)

register_architecture(
    Architecture(
        name="gpt-j",
        models=("GPTJPreTrainedModel",),
        blocks=(
            Attention(path="h.*.attn", output="out_proj", skippable=True),
            MLP(path="h.*.mlp", inputs=("fc_in",), output="fc_out"),
        ),
        depth=("config.num_hidden_layers",),
    )
)

register_architecture(
    Architecture(
        name="gpt-neo",
        models=("GPTNeoPreTrainedModel",),
        blocks=(
            Attention(path="h.*.attn.attention", output="out_proj"),
            MLP(path="h.*.mlp", inputs=("c_fc",), output="c_proj"),
        ),
        depth=("config.num_hidden_layers", "config.attention_layers"),
    )
)

register_architecture(
    Architecture(
        name="opt",
        models=("OPTPreTrainedModel", "BioGptPreTrainedModel"),
        blocks=(
            Attention(path="layers.*.self_attn", output="out_proj", skippable=True),
            MLP(path="layers.*", inputs=("fc1",), output="fc2"),
        ),
        depth=("config.num_hidden_layers",),
    )
)
