"""MoDeGPT (Lin et al., ICLR 2025) on a Llama: our implementation of the paper, for benchmarks/quality.py."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from peers_walk import covariance, damped, inputs_of, root, stored_parameters, walk
from torch import Tensor, nn

from lit_prune.groups import count_parameters

MOST = 0.9


@torch.no_grad()
def modegpt(model: nn.Module, batches: Sequence[Tensor], parameters: int, *, temperature: float | None) -> nn.Module:
    """Nyström for MLPs, CR for query and key with rotary pairs, SVD for value and output, one layer after the other.

    Args:
        model: A Llama.
        batches: Token ids of shape (batch, tokens).
        parameters: How many the result may store.
        temperature: Of the allocation over layers, a softmax of what a layer changes (one minus the cosine of its input and
            output); ``None`` gives every layer the same share.
    """
    changed: Any = copy.deepcopy(model)
    shares = _shares(changed, batches, parameters, temperature)
    for position, (layer, states, arguments) in enumerate(walk(changed, batches)):
        sizes = _sizes(changed, shares[position])
        normed = [layer.input_layernorm(x) for x in states]
        _compress_query_key(layer.self_attn, normed, sizes["pairs"])
        _compress_value_output(layer.self_attn, normed, sizes["values"])
        attended = [x + layer.self_attn(hidden_states=n, **arguments)[0] for x, n in zip(states, normed, strict=True)]
        _compress_mlp(layer.mlp, [layer.post_attention_layernorm(x) for x in attended], sizes["channels"])
    return stored_parameters(changed, _stored(changed, shares))


def _sizes(model: Any, share: float) -> dict[str, int]:
    """How many rotary pairs, value features a head and MLP channels stay where a share of the parameters goes."""
    config, attention = model.config, model.model.layers[0].self_attn
    return {
        "pairs": max(1, round((1 - share) * attention.head_dim / 2)),
        "values": max(1, round((1 - share) * attention.head_dim)),
        "channels": max(1, round((1 - share) * config.intermediate_size)),
    }


def _layer_parameters(model: Any, share: float) -> int:
    config, sizes = model.config, _sizes(model, share)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    attention = (heads + groups) * (2 * sizes["pairs"] + sizes["values"])
    return config.hidden_size * (attention + 3 * sizes["channels"])


def _stored(model: Any, shares: Sequence[float]) -> int:
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    return count_parameters(model) - layers + sum(_layer_parameters(model, share) for share in shares)


def _shares(model: Any, batches: Sequence[Tensor], parameters: int, temperature: float | None) -> list[float]:
    """The share that goes from every layer, so that the model stores ``parameters``."""
    weights = torch.ones(len(model.model.layers), dtype=torch.float64)
    if temperature is not None:
        changes = []
        for layer, states, arguments in walk(model, batches):
            outputs = [layer(x, **arguments) for x in states]
            cosines = [torch.cosine_similarity(x, y, dim=-1).mean() for x, y in zip(states, outputs, strict=True)]
            changes.append(1 - torch.stack(cosines).mean().item())
        weights = torch.softmax(-torch.tensor(changes, dtype=torch.float64) / temperature, 0) * len(changes)
    low, high = 0.0, 1 / weights.min().item()
    for _ in range(60):
        middle = (low + high) / 2
        shares = (weights * middle).clamp(max=MOST).tolist()
        low, high = (middle, high) if _stored(model, shares) > parameters else (low, middle)
    return shares


def _compress_mlp(mlp: Any, inputs: Sequence[Tensor], kept: int) -> None:
    read = inputs_of(mlp.down_proj, lambda: [mlp(x) for x in inputs])
    gram = covariance(read)
    scores = torch.linalg.solve(damped(gram), gram).diagonal()
    chosen = scores.topk(kept).indices.sort().values
    weight = mlp.down_proj.weight.double().T
    refitted = torch.linalg.solve(damped(gram[chosen][:, chosen], 1e-6), gram[chosen] @ weight)
    mlp.down_proj.weight.zero_()
    mlp.down_proj.weight[:, chosen] = refitted.T.to(mlp.down_proj.weight.dtype)


def _compress_query_key(attention: Any, inputs: Sequence[Tensor], kept: int) -> None:
    """Rotary pairs by the product of the norms of the queries' (of all heads that share the key) and of the keys' features."""
    features, half = attention.head_dim, attention.head_dim // 2
    gram = covariance(inputs)

    def energies(weight: Tensor) -> Tensor:
        w = weight.double()
        return ((w @ gram) * w).sum(1)

    keys = energies(attention.k_proj.weight).view(-1, features)
    queries = energies(attention.q_proj.weight).view(len(keys), -1, features).sum(1)
    scores = (queries * keys).sqrt()
    chosen = (scores[:, :half] + scores[:, half:]).topk(kept, dim=1).indices
    mask = torch.zeros(len(keys), half, dtype=torch.bool).scatter_(1, chosen, True)
    mask = torch.cat([mask, mask], 1)
    attention.k_proj.weight.mul_(mask.view(-1, 1))
    attention.q_proj.weight.mul_(mask[:, None].expand(-1, attention.num_key_value_groups, -1).reshape(-1, 1))


def _compress_value_output(attention: Any, inputs: Sequence[Tensor], kept: int) -> None:
    """Low rank of each value head with the outputs of all heads that read it, in the metric of the inputs."""
    gram = damped(covariance(inputs), 1e-6)
    half, back = root(gram, 0.5), root(gram, -0.5)
    features, shared = attention.head_dim, attention.num_key_value_groups
    value, output = attention.v_proj.weight, attention.o_proj.weight
    hidden = len(output)
    for head in range(len(value) // features):
        rows = slice(head * features, (head + 1) * features)
        columns = slice(head * shared * features, (head + 1) * shared * features)
        left, scale, right = torch.linalg.svd(half @ value[rows].double().T, full_matrices=False)
        read = output[:, columns].double().view(hidden, shared, features).permute(2, 1, 0).reshape(features, -1)
        inner, strength, outer = torch.linalg.svd(scale[:, None] * (right @ read), full_matrices=False)
        value[rows] = 0
        value[rows][:kept] = (back @ left @ inner[:, :kept]).T.to(value.dtype)
        written = torch.zeros_like(read)
        written[:kept] = strength[:kept, None] * outer[:kept]
        output[:, columns] = (
            written.view(features, shared, hidden).permute(2, 1, 0).reshape(hidden, -1).to(output.dtype)
        )
