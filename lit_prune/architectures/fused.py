"""Decoders whose queries, keys and values come from one projection."""

from torch import nn

from lit_prune.architectures.base import (
    INTERLEAVED,
    MLP,
    Architecture,
    Attention,
    register_architecture,
)
from lit_prune.errors import UnsupportedModelError

register_architecture(
    Architecture(
        name="phi3",
        models=("Phi3PreTrainedModel",),
        blocks=(
            Attention(
                path="layers.*.self_attn",
                fused="qkv_proj",
                attributes={
                    "config.num_attention_heads": "query_heads",
                    "num_key_value_heads": "key_value_heads",
                    "num_key_value_groups": "queries_per_key_value",
                },
                skippable=True,
            ),
            MLP(path="layers.*.mlp", inputs=("gate_up_proj",), parts=2),
        ),
        depth=("config.num_hidden_layers",),
    )
)

register_architecture(
    Architecture(
        name="gpt2",
        models=("GPT2PreTrainedModel",),
        blocks=(
            Attention(
                path="h.*.attn",
                fused="c_attn",
                output="c_proj",
                attributes={"num_heads": "query_heads", "split_size": "query_features"},
                skippable=True,
            ),
            MLP(path="h.*.mlp", inputs=("c_fc",), output="c_proj"),
        ),
        depth=("config.num_hidden_layers",),
    )
)

register_architecture(
    Architecture(
        name="gpt-neox",
        models=("GPTNeoXPreTrainedModel",),
        blocks=(
            Attention(
                path="layers.*.attention",
                fused="query_key_value",
                layout=INTERLEAVED,
                output="dense",
                head_dim="head_size",
                skippable=True,
            ),
            MLP(path="layers.*.mlp", inputs=("dense_h_to_4h",), output="dense_4h_to_h"),
        ),
        depth=("config.num_hidden_layers",),
    )
)


def _check_falcon(model: nn.Module) -> None:
    """The slopes of ALiBi are computed once, for as many heads as the config says."""
    if getattr(getattr(model, "config", None), "alibi", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} adds ALiBi slopes, computed for all heads of the config, to the attention of every"
            " layer (config.alibi is True); layers with fewer heads cannot read them. Only rotary positions are supported."
        )


register_architecture(
    Architecture(
        name="falcon",
        models=("FalconPreTrainedModel",),
        blocks=(
            Attention(
                path="h.*.self_attention",
                fused="query_key_value",
                layout=INTERLEAVED,
                output="dense",
                attributes={"num_heads": "query_heads", "num_kv_heads": "key_value_heads"},
                skippable=True,
            ),
            MLP(path="h.*.mlp", inputs=("dense_h_to_4h",), output="dense_4h_to_h"),
        ),
        depth=("config.num_hidden_layers",),
        check=_check_falcon,
    )
)
