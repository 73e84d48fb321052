"""SliceGPT (Ashkboos et al., ICLR 2024) on a Llama: our implementation of the paper, for benchmarks/quality.py."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from peers_walk import covariance, stored_parameters, walk
from torch import Tensor, nn


class SlicedLayer(nn.Module):
    """A decoder layer whose residual stream is projected behind attention and behind the MLP.

    Rotating by an orthogonal matrix, keeping the first columns, and going on in them with rotated weights and an adapter on
    the shortcut gives the same numbers as projecting on the span of the columns in the old basis, which is what this does. The
    norms divide by the norm over the original size, as SliceGPT's do.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.projections: list[Tensor] = []

    def after_attention(self, states: Tensor, **arguments: Any) -> Tensor:
        attended, _ = self.layer.self_attn(hidden_states=self.layer.input_layernorm(states), **arguments)
        return states + attended

    def after_mlp(self, states: Tensor) -> Tensor:
        return states + self.layer.mlp(self.layer.post_attention_layernorm(states))

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        states = self.after_attention(hidden_states, **arguments) @ self.projections[0]
        return self.after_mlp(states) @ self.projections[1]


@torch.no_grad()
def slicegpt(model: nn.Module, batches: Sequence[Tensor], parameters: int, *, tied: bool) -> nn.Module:
    """Principal directions of the residual stream in front of every norm, the same number kept everywhere.

    Args:
        model: A Llama.
        batches: Token ids of shape (batch, tokens).
        parameters: How many the result may store, adapters included.
        tied: Count the embeddings and the head once. SliceGPT needs both, as they are rotated differently: ``False`` counts
            what it stores.
    """
    sliced: Any = copy.deepcopy(model)
    size = sliced.config.hidden_size
    kept = _width(sliced, parameters, tied)
    embedded = [sliced.model.embed_tokens(batch) for batch in batches]
    first = _projection(embedded, kept)
    sliced.model.embed_tokens.register_forward_hook(lambda module, given, output: output @ first)
    for position, (layer, states, arguments) in enumerate(walk(sliced, batches)):
        replaced = SlicedLayer(layer)
        middle = [replaced.after_attention(x, **arguments) for x in states]
        replaced.projections.append(_projection(middle, kept))
        middle = [x @ replaced.projections[0] for x in middle]
        replaced.projections.append(_projection([replaced.after_mlp(x) for x in middle], kept))
        sliced.model.layers[position] = replaced
    return stored_parameters(sliced, _stored(sliced, kept, tied) if kept < size else parameters)


def _projection(tensors: Sequence[Tensor], kept: int) -> Tensor:
    _, vectors = torch.linalg.eigh(covariance(tensors))
    chosen = vectors[:, -kept:]
    return (chosen @ chosen.T).to(tensors[0].dtype)


def _sizes(model: Any) -> tuple[int, int, int]:
    """Rows and columns that read or write the stream in all layers, adapters of the shortcuts, and the vocabulary."""
    wide = 0
    for layer in model.model.layers:
        layer = getattr(layer, "layer", layer)
        wide += sum(p.numel() for p in layer.parameters() if p.dim() == 2) // model.config.hidden_size
    return wide, 2 * len(model.model.layers), model.config.vocab_size


def _stored(model: Any, kept: int, tied: bool) -> int:
    wide, adapters, words = _sizes(model)
    return (wide + words * (1 if tied else 2)) * kept + adapters * kept**2


def _width(model: Any, parameters: int, tied: bool) -> int:
    wide, adapters, words = _sizes(model)
    linear = wide + words * (1 if tied else 2)
    exact = (-linear + math.sqrt(linear**2 + 4 * adapters * parameters)) / (2 * adapters)
    return min(model.config.hidden_size, int(exact))
