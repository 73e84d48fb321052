"""Decoders with ALiBi: slopes that the model computes for all heads of its config, and every layer adds to its scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lit_prune.architectures.adaptations import KeptHeads, kept_heads
from lit_prune.architectures.components import MLP, Attention
from lit_prune.architectures.registry import Architecture, register_architecture
from lit_prune.architectures.slices import INTERLEAVED


class WithOwnSlopes(KeptHeads):
    """Mixed into the attention of BLOOM and Falcon once it lost heads: of the slopes, it reads those of its own heads."""

    def forward(self, hidden_states: Tensor, *args: Any, alibi: Tensor | None = None, **kwargs: Any) -> Any:
        """As of the class that this is mixed into.

        Args:
            hidden_states: Shape ``(batch, tokens, hidden)``.
            args: As of that class.
            alibi: For the heads of the dense model, shape ``(batch * heads, 1, keys)`` or ``(batch, heads, 1, keys)``.
            kwargs: As of that class; an ``attention_mask`` may hold ALiBi, too, and have a head dimension then.
        """
        if alibi is not None:
            whole = alibi.view(len(hidden_states), -1, 1, alibi.shape[-1])
            own = whole[:, self.kept_heads]
            mask = kwargs.get("attention_mask")
            if mask is not None and mask.shape[1] == whole.shape[1] > 1:
                kwargs["attention_mask"] = mask[:, self.kept_heads]
            alibi = own if alibi.dim() == 4 else own.flatten(0, 1)
        return super().forward(hidden_states, *args, alibi=alibi, **kwargs)  # type: ignore[misc]


class WithOwnBias(KeptHeads):
    """Mixed into the attention of MPT once it lost heads."""

    def forward(self, *args: Any, position_bias: Tensor | None = None, **kwargs: Any) -> Any:
        """As of MPT's attention; ``position_bias``, shape ``(heads, 1, keys)``, is for the heads of the dense model."""
        own = None if position_bias is None else position_bias[self.kept_heads]
        return super().forward(*args, position_bias=own, **kwargs)  # type: ignore[misc]


def own_slopes(module: nn.Module, kept: Tensor) -> Callable[[], None]:
    """The adaptation (see :class:`~lit_prune.groups.Adaptation`) of BLOOM's and Falcon's attention to fewer heads."""
    return kept_heads(module, kept, WithOwnSlopes)


def own_bias(module: nn.Module, kept: Tensor) -> Callable[[], None]:
    """The adaptation (see :class:`~lit_prune.groups.Adaptation`) of MPT's attention to fewer heads."""
    return kept_heads(module, kept, WithOwnBias)


# BLOOM's attention adds the residual itself, so a layer keeps a head: nothing could be skipped
register_architecture(
    Architecture(
        name="bloom",
        models=("transformers.BloomPreTrainedModel",),
        components=(
            Attention(
                path="h.*.self_attention",
                fused="query_key_value",
                layout=INTERLEAVED,
                output="dense",
                adapt=own_slopes,
            ),
            MLP(path="h.*.mlp", inputs=("dense_h_to_4h",), output="dense_4h_to_h"),
        ),
        depth=("config.num_hidden_layers",),
    )
)

register_architecture(
    Architecture(
        name="mpt",
        models=("transformers.MptPreTrainedModel",),
        components=(
            Attention(
                path="blocks.*.attn",
                fused="Wqkv",
                output="out_proj",
                attributes={"n_heads": "query_heads"},
                adapt=own_bias,
                skippable=True,
            ),
            MLP(path="blocks.*.ffn", inputs=("up_proj",), output="down_proj"),
        ),
        depth=("config.num_hidden_layers",),
    )
)
