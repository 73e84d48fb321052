"""Decoders with separate query, key, value and output projections."""

from torch import nn

from lit_prune.architectures.components import MLP, Attention
from lit_prune.architectures.families.mixers import GATED_DELTA_NET
from lit_prune.architectures.registry import Architecture, register_architecture
from lit_prune.architectures.stream import Stream
from lit_prune.errors import UnsupportedModelError

# of all families here: one has a norm before each part, another behind it, a third both
STREAM = Stream(
    embeddings=("embed_tokens",),
    norms=(
        "layers.*.input_layernorm",
        "layers.*.post_attention_layernorm",
        "layers.*.pre_feedforward_layernorm",
        "layers.*.post_feedforward_layernorm",
        "norm",
    ),
    readers=("lm_head", "score", "qa_outputs"),
)

register_architecture(
    Architecture(
        name="llama",
        models=(
            "transformers.LlamaPreTrainedModel",
            "transformers.MistralPreTrainedModel",
            "transformers.Qwen2PreTrainedModel",
            "transformers.Qwen3PreTrainedModel",
            "transformers.GemmaPreTrainedModel",
            "transformers.Gemma2PreTrainedModel",
            "transformers.Gemma3PreTrainedModel",
            "transformers.SmolLM3PreTrainedModel",
            "transformers.GranitePreTrainedModel",
            "transformers.OlmoPreTrainedModel",
            "transformers.HeliumPreTrainedModel",
            "transformers.Exaone4PreTrainedModel",
            "transformers.SeedOssPreTrainedModel",
            "transformers.Ernie4_5PreTrainedModel",
            "transformers.Ministral3PreTrainedModel",
            # of these the towers of images stay whole: their blocks have other names
            "transformers.Qwen2VLPreTrainedModel",
            "transformers.Qwen2_5_VLPreTrainedModel",
            "transformers.Qwen3VLPreTrainedModel",
        ),
        components=(
            Attention(path="layers.*.self_attn", skippable=True),
            MLP(path="layers.*.mlp"),
        ),
        depth=("config.num_hidden_layers", "config.layer_types", "config.no_rope_layers"),
        stream=STREAM,
    )
)

# the tower of images stays whole
register_architecture(
    Architecture(
        name="gemma3-images",
        models=(
            "transformers.Gemma3Model",
            "transformers.Gemma3ForConditionalGeneration",
            "transformers.Gemma3ForSequenceClassification",
        ),
        components=(
            Attention(path="language_model.layers.*.self_attn", skippable=True),
            MLP(path="language_model.layers.*.mlp"),
        ),
    )
)

# the scales of the norms of queries and keys have a row a head
register_architecture(
    Architecture(
        name="cohere",
        models=("transformers.CoherePreTrainedModel", "transformers.Cohere2PreTrainedModel"),
        components=(
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
        models=("transformers.Olmo2PreTrainedModel", "transformers.Olmo3PreTrainedModel"),
        components=(
            Attention(
                path="layers.*.self_attn",
                parameters={"q_norm.weight": "query_features", "k_norm.weight": "key_value_features"},
                skippable=True,
            ),
            MLP(path="layers.*.mlp"),
        ),
        depth=("config.num_hidden_layers", "config.layer_types"),
        stream=STREAM,
    )
)

# a gate lies behind each head's query; layers of linear attention are mixed in
register_architecture(
    Architecture(
        name="qwen3.5",
        models=("transformers.Qwen3_5PreTrainedModel",),
        components=(
            Attention(path="layers.*.self_attn", query_parts=2, skippable=True, optional=True),
            GATED_DELTA_NET,
            MLP(path="layers.*.mlp"),
        ),
        depth=("config.num_hidden_layers", "config.layer_types"),
    )
)

# its layers share keys and values, so that heads cannot leave one by itself
register_architecture(
    Architecture(
        name="gemma4",
        models=("transformers.Gemma4ForCausalLM", "transformers.Gemma4TextModel"),
        components=(MLP(path="layers.*.mlp"),),
    )
)

register_architecture(
    Architecture(
        name="glm",
        models=("transformers.GlmPreTrainedModel", "transformers.Glm4PreTrainedModel"),
        components=(
            Attention(path="layers.*.self_attn", skippable=True),
            MLP(path="layers.*.mlp", inputs=("gate_up_proj",), parts=2),
        ),
        depth=("config.num_hidden_layers",),
    )
)

register_architecture(
    Architecture(
        name="nemotron",
        models=(
            "transformers.NemotronPreTrainedModel",
            "transformers.ArceePreTrainedModel",
            "transformers.ApertusPreTrainedModel",
        ),
        components=(
            Attention(path="layers.*.self_attn", skippable=True),
            MLP(path="layers.*.mlp", inputs=("up_proj",)),
        ),
        depth=("config.num_hidden_layers",),
    )
)

register_architecture(
    Architecture(
        name="starcoder2",
        models=("transformers.Starcoder2PreTrainedModel",),
        components=(
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
        models=("transformers.StableLmPreTrainedModel",),
        components=(Attention(path="layers.*.self_attn", skippable=True), MLP(path="layers.*.mlp")),
        check=_check_stablelm,
        depth=("config.num_hidden_layers",),
    )
)

register_architecture(
    Architecture(
        name="phi",
        models=("transformers.PhiPreTrainedModel",),
        components=(
            Attention(path="layers.*.self_attn", output="dense", skippable=True),
            MLP(path="layers.*.mlp", inputs=("fc1",), output="fc2"),
        ),
        depth=("config.num_hidden_layers",),
    )
)

register_architecture(
    Architecture(
        name="gpt-j",
        models=("transformers.GPTJPreTrainedModel",),
        components=(
            Attention(path="h.*.attn", output="out_proj", skippable=True),
            MLP(path="h.*.mlp", inputs=("fc_in",), output="fc_out"),
        ),
        depth=("config.num_hidden_layers",),
    )
)

register_architecture(
    Architecture(
        name="gpt-neo",
        models=("transformers.GPTNeoPreTrainedModel",),
        components=(
            Attention(path="h.*.attn.attention", output="out_proj"),
            MLP(path="h.*.mlp", inputs=("c_fc",), output="c_proj"),
        ),
        depth=("config.num_hidden_layers", "config.attention_layers"),
    )
)

register_architecture(
    Architecture(
        name="opt",
        models=("transformers.OPTPreTrainedModel", "transformers.BioGptPreTrainedModel"),
        components=(
            Attention(path="layers.*.self_attn", output="out_proj", skippable=True),
            MLP(path="layers.*", inputs=("fc1",), output="fc2"),
        ),
        depth=("config.num_hidden_layers",),
    )
)
