"""LitGPT's ``GPT``: one class for all its models, whose config says which attention and which MLP a layer has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lit_prune.architectures.adaptations import nothing_to_undo
from lit_prune.architectures.arguments import Positions
from lit_prune.architectures.components import MLP, Attention
from lit_prune.architectures.latent_attention import LatentAttention
from lit_prune.architectures.registry import Architecture, register_architecture
from lit_prune.errors import UnsupportedModelError

_BLOCKS = "transformer.h"
_HEADS = {"config.n_head": "query_heads", "config.n_query_groups": "key_value_heads"}
# modules of litgpt whose GPT has adapters inside its layers, and how they become weights
_ADAPTED = {
    "litgpt.lora": "Write the merged weights with `litgpt merge_lora`, load them into a litgpt.GPT, and prune that",
    "litgpt.adapter": "Prune a litgpt.GPT, and train the adapter on the pruned model",
    "litgpt.adapter_v2": "Prune a litgpt.GPT, and train the adapter on the pruned model",
}


def _head_size(attention: Any) -> int:
    return attention.config.head_size


def _norms_over_heads(attention: Any) -> Mapping[str, str]:
    """The norms of queries and keys, if they are over all heads; else they are of one head, and stay."""
    if not attention.config.norm_qk or attention.config.norm_qk_type != "olmo2":
        return {}
    return {"norm_q.weight": "query_features", "norm_k.weight": "key_value_features"}


def _latent_widths(attention: Any) -> tuple[int, int, int]:
    config = attention.config
    return config.qk_head_dim, config.qk_nope_head_dim + config.v_head_dim, config.v_head_dim


def _without_cache(attention: nn.Module, _: Tensor) -> Callable[[], None]:
    """The adaptation (see :class:`~lit_prune.groups.Adaptation`) of attention that holds a cache of the keys of all heads."""
    cache: Any = attention.kv_cache
    if cache is None:
        return nothing_to_undo
    # forward says then that set_kv_cache has to be called
    attention.kv_cache = None  # type: ignore[assignment]

    def undo() -> None:
        attention.kv_cache = cache

    return undo


def _check(model: nn.Module) -> None:
    for cls in type(model).__mro__:
        if cls.__module__ in _ADAPTED:
            raise UnsupportedModelError(
                f"{cls.__module__}.{cls.__name__} has adapters inside its layers, which a cut would have to follow; expected"
                f" litgpt.GPT. {_ADAPTED[cls.__module__]}."
            )
    for index, block in enumerate(model.get_submodule(_BLOCKS).children()):
        attention: Any = block.attn
        norm = getattr(attention, "norm_q", None)
        if isinstance(norm, nn.Module) and _norms_over_heads(attention) and next(iter(norm.parameters()), None) is None:
            raise UnsupportedModelError(
                f"{_BLOCKS}.{index}.attn.norm_q ({type(norm).__name__}) is over all heads and has no weights;"
                " expected a norm with weights (config.norm_qk_type is 'olmo2'), or one for each head ('default')."
            )
        if not any(hasattr(block.mlp, name) for name in ("fc", "fc_1", "experts")):
            raise UnsupportedModelError(
                f"{_BLOCKS}.{index}.mlp ({type(block.mlp).__name__}) was expected to have the parts of one of LitGPT's MLPs (fc;"
                f" fc_1 and fc_2; experts); it has {[name for name, _ in block.mlp.named_children()]}."  # type: ignore[union-attr]
            )


register_architecture(
    Architecture(
        name="litgpt",
        models=("litgpt.model.GPT",),
        components=(
            Attention(
                path=f"{_BLOCKS}.*.attn",
                fused="qkv",
                output="proj",
                head_dim=_head_size,
                attributes=_HEADS,
                parameters=_norms_over_heads,
                skippable=True,
                weights=False,
                adapt=_without_cache,
                requires="qkv",
            ),
            LatentAttention(
                path=f"{_BLOCKS}.*.attn",
                output="proj",
                head_dims=_latent_widths,
                attributes=_HEADS,
                skippable=True,
                weights=False,
                adapt=_without_cache,
                requires="kv_b_proj",
            ),
            MLP(path=f"{_BLOCKS}.*.mlp", inputs=("fc",), output="proj", requires="fc", optional=True),
            MLP(path=f"{_BLOCKS}.*.mlp", inputs=("fc_1", "fc_2"), output="proj", requires="fc_1", optional=True),
            MLP(
                path=f"{_BLOCKS}.*.mlp.experts.*",
                inputs=("fc_1", "fc_2"),
                output="proj",
                routed=True,
                optional=True,
            ),
            MLP(path=f"{_BLOCKS}.*.mlp.shared_experts", inputs=("fc_1", "fc_2"), output="proj", optional=True),
        ),
        check=_check,
        depth=("config.n_layer", "config.sliding_window_indices", "config.rope_indices"),
        arguments=(Positions(("idx",)),),
    )
)
