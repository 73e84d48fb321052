"""Decoders whose queries, keys and values come from one projection."""

from collections.abc import Callable

from torch import Tensor, nn

from lit_prune.architectures.adaptations import nothing_to_undo
from lit_prune.architectures.components import MLP, Attention
from lit_prune.architectures.families.alibi import own_slopes
from lit_prune.architectures.registry import Architecture, register_architecture
from lit_prune.architectures.slices import INTERLEAVED
from lit_prune.architectures.stream import Stream
from lit_prune.errors import UnsupportedModelError

register_architecture(
    Architecture(
        name="phi3",
        models=("transformers.Phi3PreTrainedModel",),
        components=(
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
        stream=Stream(
            embeddings=("embed_tokens",),
            norms=("layers.*.input_layernorm", "layers.*.post_attention_layernorm", "norm"),
            readers=("lm_head", "score"),
        ),
    )
)

register_architecture(
    Architecture(
        name="gpt2",
        models=("transformers.GPT2PreTrainedModel",),
        components=(
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
        stream=Stream(
            embeddings=("wte", "wpe"),
            norms=("h.*.ln_1", "h.*.ln_2", "ln_f"),
            readers=("lm_head", "score", "classifier", "qa_outputs"),
        ),
    )
)

register_architecture(
    Architecture(
        name="gpt-neox",
        models=("transformers.GPTNeoXPreTrainedModel",),
        components=(
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
    config = getattr(model, "config", None)
    shared = getattr(config, "new_decoder_architecture", False) and config.num_kv_heads != config.num_attention_heads  # type: ignore[union-attr]
    if getattr(config, "alibi", False) and shared:
        raise UnsupportedModelError(
            f"{type(model).__name__} has ALiBi and heads that share keys and values (config.alibi and"
            " config.new_decoder_architecture); expected one of the two."
        )


def _own_slopes(module: nn.Module, kept: Tensor) -> Callable[[], None]:
    return own_slopes(module, kept) if module.config.alibi else nothing_to_undo  # type: ignore[union-attr]


register_architecture(
    Architecture(
        name="falcon",
        models=("transformers.FalconPreTrainedModel",),
        components=(
            Attention(
                path="h.*.self_attention",
                fused="query_key_value",
                layout=INTERLEAVED,
                output="dense",
                attributes={"num_heads": "query_heads", "num_kv_heads": "key_value_heads"},
                adapt=_own_slopes,
                skippable=True,
            ),
            MLP(path="h.*.mlp", inputs=("dense_h_to_4h",), output="dense_4h_to_h"),
        ),
        depth=("config.num_hidden_layers",),
        check=_check_falcon,
    )
)


def _check_bigcode(model: nn.Module) -> None:
    if not getattr(getattr(model, "config", None), "multi_query", True):
        raise UnsupportedModelError(
            f"{type(model).__name__} was built with config.multi_query=False, which the description does not cover; expected"
            " multi-query attention."
        )


register_architecture(
    Architecture(
        name="gpt-bigcode",
        models=("transformers.GPTBigCodePreTrainedModel",),
        components=(
            Attention(
                path="h.*.attn",
                fused="c_attn",
                output="c_proj",
                attributes={
                    "num_heads": "query_heads",
                    "num_key_value_groups": "query_heads",
                    "embed_dim": "query_features",
                },
            ),
            MLP(path="h.*.mlp", inputs=("c_fc",), output="c_proj"),
        ),
        check=_check_bigcode,
        depth=("config.num_hidden_layers",),
    )
)
