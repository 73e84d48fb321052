"""Encoders of text and images."""

from lit_prune.architectures.components import MLP, Attention
from lit_prune.architectures.registry import Architecture, register_architecture
from lit_prune.architectures.stream import Stream

_HEADS = {"num_attention_heads": "query_heads", "all_head_size": "query_features"}

register_architecture(
    Architecture(
        name="bert",
        models=(
            "transformers.BertPreTrainedModel",
            "transformers.RobertaPreTrainedModel",
            "transformers.XLMRobertaPreTrainedModel",
            "transformers.CamembertPreTrainedModel",
            "transformers.ElectraPreTrainedModel",
        ),
        components=(
            Attention(
                path="layer.*.attention",
                query="self.query",
                key="self.key",
                value="self.value",
                output="output.dense",
                core="self",
                head_dim="attention_head_size",
                attributes=_HEADS,
                skippable=True,
            ),
            MLP(path="layer.*", inputs=("intermediate.dense",), output="output.dense"),
        ),
        depth=("config.num_hidden_layers",),
        # what a pooler or the transform before a tied decoder gives is as wide in every config
        stream=Stream(
            embeddings=(
                "embeddings.word_embeddings",
                "embeddings.position_embeddings",
                "embeddings.token_type_embeddings",
            ),
            norms=(
                "embeddings.LayerNorm",
                "layer.*.attention.output.LayerNorm",
                "layer.*.output.LayerNorm",
                "transform.LayerNorm",
                "lm_head.layer_norm",
            ),
            readers=(
                "pooler.dense",
                "transform.dense",
                "predictions.decoder",
                "cls.seq_relationship",
                "lm_head.dense",
                "lm_head.decoder",
                "classifier",
                "classifier.dense",
                "classifier.out_proj",
                "qa_outputs",
            ),
            writers=("pooler.dense", "transform.dense", "lm_head.dense", "classifier.dense"),
        ),
    )
)

# DeBERTa's positions have projections of their own, unless they share those of the words
register_architecture(
    Architecture(
        name="deberta-v2",
        models=("transformers.DebertaV2PreTrainedModel",),
        components=(
            Attention(
                path="layer.*.attention",
                query="self.query_proj",
                key="self.key_proj",
                value="self.value_proj",
                output="output.dense",
                core="self",
                head_dim="attention_head_size",
                attributes=_HEADS,
                parameters={
                    "self.pos_key_proj.weight": "query_features",
                    "self.pos_key_proj.bias": "query_features",
                    "self.pos_query_proj.weight": "query_features",
                    "self.pos_query_proj.bias": "query_features",
                },
            ),
            MLP(path="layer.*", inputs=("intermediate.dense",), output="output.dense"),
        ),
        depth=("config.num_hidden_layers",),
    )
)

register_architecture(
    Architecture(
        name="distilbert",
        models=("transformers.DistilBertPreTrainedModel",),
        components=(
            Attention(
                path="layer.*.attention",
                query="q_lin",
                key="k_lin",
                value="v_lin",
                output="out_lin",
                head_dim="attention_head_size",
                attributes={"n_heads": "query_heads"},
            ),
            MLP(path="layer.*.ffn", inputs=("lin1",), output="lin2"),
        ),
        depth=("config.num_hidden_layers", "n_layers"),
    )
)

register_architecture(
    Architecture(
        name="modernbert",
        models=("transformers.ModernBertPreTrainedModel",),
        components=(
            Attention(path="layers.*.attn", fused="Wqkv", output="Wo", skippable=True),
            MLP(path="layers.*.mlp", inputs=("Wi",), output="Wo", parts=2),
        ),
        depth=("config.num_hidden_layers", "config.layer_types"),
    )
)

# one layer that is run several times is one place with one group set
register_architecture(
    Architecture(
        name="albert",
        models=("transformers.AlbertPreTrainedModel",),
        components=(
            Attention(
                path="albert_layer_groups.*.albert_layers.*.attention",
                query="query",
                key="key",
                value="value",
                output="dense",
                head_dim="attention_head_size",
                attributes=_HEADS,
            ),
            MLP(path="albert_layer_groups.*.albert_layers.*", inputs=("ffn",), output="ffn_output"),
        ),
    )
)

register_architecture(
    Architecture(
        name="vit",
        models=("transformers.ViTPreTrainedModel", "transformers.DeiTPreTrainedModel"),
        components=(
            Attention(path="layers.*.attention", skippable=True),
            MLP(path="layers.*.mlp", inputs=("fc1",), output="fc2"),
        ),
        depth=("config.num_hidden_layers",),
        stream=Stream(
            embeddings=("embeddings.patch_embeddings.projection",),
            norms=("layers.*.layernorm_before", "layers.*.layernorm_after", "layernorm"),
            readers=("pooler.dense", "classifier", "cls_classifier", "distillation_classifier"),
            writers=("pooler.dense",),
            parameters=(
                ("embeddings.cls_token", 2),
                ("embeddings.distillation_token", 2),
                ("embeddings.mask_token", 2),
                ("embeddings.position_embeddings", 2),
            ),
            fields=("hidden_size", "pooler_output_size"),
        ),
    )
)

register_architecture(
    Architecture(
        name="dinov2",
        models=("transformers.Dinov2PreTrainedModel",),
        components=(
            Attention(path="layer.*.attention", skippable=True),
            MLP(path="layer.*.mlp", inputs=("fc1",), output="fc2", requires="fc1"),
            MLP(path="layer.*.mlp", inputs=("weights_in",), output="weights_out", parts=2, requires="weights_in"),
        ),
    )
)

# both towers, of text and of images
register_architecture(
    Architecture(
        name="clip",
        models=("transformers.CLIPPreTrainedModel", "transformers.SiglipPreTrainedModel"),
        components=(
            Attention(path="layers.*.self_attn", output="out_proj", skippable=True),
            MLP(path="layers.*.mlp", inputs=("fc1",), output="fc2"),
        ),
    )
)
