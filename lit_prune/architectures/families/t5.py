"""T5: encoder and decoder, with relative position biases that the first layer computes for all the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lit_prune.architectures.adaptations import KeptHeads, kept_heads
from lit_prune.architectures.components import MLP, Attention
from lit_prune.architectures.registry import Architecture, register_architecture


class WithOwnHeads(KeptHeads):
    """Mixed into T5's attention once it lost heads: of the biases, which come for all heads, it reads those of its own.

    What it passes on to the next layer is for all heads again. The table of biases stays whole, as the layers share it.
    """

    _shared_bias: Tensor | None

    def compute_bias(self, *args: Any, **kwargs: Any) -> Tensor:
        """Biases of the heads that stayed, shape ``(1, heads, queries, keys)``; those of all heads are put by."""
        self._shared_bias = super().compute_bias(*args, **kwargs)  # type: ignore[misc]
        return self._shared_bias[:, self.kept_heads]

    def forward(self, *args: Any, position_bias: Tensor | None = None, **kwargs: Any) -> tuple[Any, ...]:
        """As of T5's attention; ``position_bias`` and what is returned in its place are for the heads of the dense model."""
        self._shared_bias = position_bias
        own = None if position_bias is None else position_bias[:, self.kept_heads]
        states, _, weights = super().forward(*args, position_bias=own, **kwargs)  # type: ignore[misc]
        shared, self._shared_bias = self._shared_bias, None
        return states, shared, weights


def own_heads(module: nn.Module, kept: Tensor) -> Callable[[], None]:
    """The adaptation (see :class:`~lit_prune.groups.Adaptation`) of T5's attention to fewer heads."""
    return kept_heads(module, kept, WithOwnHeads)


def _attention(path: str, kind: str) -> Attention:
    return Attention(
        path=path,
        query="q",
        key="k",
        value="v",
        output="o",
        head_dim="key_value_proj_dim",
        attributes={"n_heads": "query_heads", "inner_dim": "query_features"},
        kind=kind,
        adapt=own_heads,
        optional=kind != "attention",
    )


register_architecture(
    Architecture(
        name="t5",
        models=("transformers.T5PreTrainedModel", "transformers.MT5PreTrainedModel"),
        components=(
            _attention("block.*.layer.*.SelfAttention", "attention"),
            _attention("block.*.layer.*.EncDecAttention", "cross_attention"),
            MLP(path="block.*.layer.*.DenseReluDense", inputs=("wi",), output="wo", requires="wi"),
            MLP(path="block.*.layer.*.DenseReluDense", inputs=("wi_0", "wi_1"), output="wo", requires="wi_0"),
        ),
    )
)
