"""Encoders of text and images."""

from lit_prune.architectures.base import MLP, Architecture, Attention, register_architecture

_HEADS = {"num_attention_heads": "query_heads", "all_head_size": "query_features"}

register_architecture(
    Architecture(
        name="bert",
        models=("BertPreTrainedModel", "RobertaPreTrainedModel"),
        blocks=(
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
    )
)

# one layer that is run several times is one place with one group set
register_architecture(
    Architecture(
        name="albert",
        models=("AlbertPreTrainedModel",),
        blocks=(
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
        models=("ViTPreTrainedModel",),
        blocks=(
            Attention(path="layers.*.attention", skippable=True),
            MLP(path="layers.*.mlp", inputs=("fc1",), output="fc2"),
        ),
        depth=("config.num_hidden_layers",),
    )
)
