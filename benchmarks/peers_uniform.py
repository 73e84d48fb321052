"""Peers that remove the same share from every layer of a Llama: OSSCAR's greedy removal and Minitron's importance.

Our implementations of the papers, for benchmarks/quality.py. Heads are few: the number removed from a layer is rounded down or
up, and MLP channels make up the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peers_walk import covariance, damped, inputs_of, stored_parameters, walk
from torch import Tensor, nn

from lit_prune.groups import count_parameters


def numbers_removed(model: Any, parameters: int, *, heads_up: bool) -> tuple[int, int]:
    """Key/value heads (with the queries that read them) and MLP channels that go from every layer."""
    config, attention = model.config, model.model.layers[0].self_attn
    head = 2 * config.hidden_size * attention.head_dim * (1 + attention.num_key_value_groups)
    channel = 3 * config.hidden_size
    whole = head * config.num_key_value_heads + channel * config.intermediate_size
    each = (count_parameters(model) - parameters) / config.num_hidden_layers
    heads = min(int(each / whole * config.num_key_value_heads) + heads_up, config.num_key_value_heads - 1)
    return heads, max(0, round((each - heads * head) / channel))


def _result(model: Any, dense: nn.Module, heads: int, channels: int) -> nn.Module:
    config, attention = model.config, model.model.layers[0].self_attn
    head = 2 * config.hidden_size * attention.head_dim * (1 + attention.num_key_value_groups)
    gone = config.num_hidden_layers * (heads * head + channels * 3 * config.hidden_size)
    return stored_parameters(model, count_parameters(dense) - gone)


@torch.no_grad()
def osscar(model: nn.Module, batches: Sequence[Tensor], parameters: int, *, heads_up: bool) -> nn.Module:
    """OSSCAR's local step (Meng et al., ICML 2024): groups go one by one, the least squares solution updated after each."""
    changed: Any = copy.deepcopy(model)
    heads, channels = numbers_removed(model, parameters, heads_up=heads_up)
    for layer, states, arguments in walk(changed, batches):
        attention = layer.self_attn
        normed = [layer.input_layernorm(x) for x in states]
        width = attention.head_dim * attention.num_key_value_groups

        attend = partial(_attend, attention, normed, arguments)
        _remove_greedily(attention.o_proj, inputs_of(attention.o_proj, attend), width, heads)
        middle = [layer.post_attention_layernorm(x + a) for x, a in zip(states, attend(), strict=True)]
        read = inputs_of(layer.mlp.down_proj, partial(_apply, layer.mlp, middle))
        _remove_greedily(layer.mlp.down_proj, read, 1, channels)
    return _result(changed, model, heads, channels)


def _attend(attention: Any, inputs: Sequence[Tensor], arguments: dict[str, Any]) -> list[Tensor]:
    return [attention(hidden_states=x, **arguments)[0] for x in inputs]


def _apply(module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [module(x) for x in inputs]


def _remove_greedily(linear: Any, inputs: Sequence[Tensor], width: int, count: int) -> None:
    """Zero ``count`` groups of ``width`` input features, each time the one whose removal costs least after refitting.

    The cost of group S is tr(W_S [(H^-1)_SS]^-1 W_S^T); then W and H^-1 are updated as in optimal brain surgery.
    """
    inverse = torch.linalg.inv(damped(covariance(inputs)))
    weight = linear.weight.double()
    left = torch.ones(len(inverse) // width, dtype=torch.bool)
    for _ in range(count):
        group = int(_costs(weight, inverse, left, width).masked_fill(~left, float("inf")).argmin())
        chosen = slice(group * width, (group + 1) * width)
        solved = torch.linalg.solve(inverse[chosen, chosen], inverse[chosen])
        weight.addmm_(weight[:, chosen].clone(), solved, alpha=-1)
        inverse.addmm_(inverse[:, chosen].clone(), solved, alpha=-1)
        left[group] = False
        # what rounding leaves behind would be divided by later
        weight[:, chosen] = 0
        inverse[chosen], inverse[:, chosen] = 0, 0
    linear.weight.copy_(weight)


def _costs(weight: Tensor, inverse: Tensor, left: Tensor, width: int) -> Tensor:
    """What the removal of each group costs; anything for groups that are gone."""
    if width == 1:
        return weight.square().sum(0) / inverse.diagonal().masked_fill(~left, 1.0)
    parts = inverse.view(len(left), width, len(left), width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    columns = weight.view(len(weight), len(left), width).permute(1, 2, 0)
    blocks = parts.clone()
    blocks[~left] = torch.eye(width, dtype=blocks.dtype)
    return (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))


@torch.no_grad()
def minitron(model: nn.Module, batches: Sequence[Tensor], parameters: int, *, heads_up: bool) -> nn.Module:
    """Minitron's activation importance (Muralidharan et al., NeurIPS 2024), without repair.

    Of a head the norm of its output, of a channel its activation: mean over the tokens, then L2 over the sequences.
    """
    changed: Any = copy.deepcopy(model)
    heads, channels = numbers_removed(model, parameters, heads_up=heads_up)
    attention = changed.model.layers[0].self_attn
    width = attention.head_dim * attention.num_key_value_groups
    totals: dict[nn.Module, list[Tensor]] = {}
    handles = []
    for layer in changed.model.layers:
        for linear, features in ((layer.self_attn.o_proj, width), (layer.mlp.down_proj, 1)):
            found = totals[linear] = []

            def observe(m: nn.Module, given: Any, features: int = features, found: list[Tensor] = found) -> None:
                found.append(given[0].unflatten(-1, (-1, features)).norm(dim=-1).mean(1))

            handles.append(linear.register_forward_pre_hook(observe))
    for batch in batches:
        changed.model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    for linear, found in totals.items():
        scores = torch.cat(found).square().sum(0)
        features = linear.in_features // len(scores)
        gone = scores.argsort()[: heads if features > 1 else channels]
        linear.weight.mul_(torch.ones(len(scores)).index_fill_(0, gone, 0).repeat_interleave(features))
    return _result(changed, model, heads, channels)
