"""Other people's pruning of a BERT encoder, at a given number of parameters, for benchmarks/sentence_quality.py."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from lit_prune import PruningConfig, PruningPlan, apply_plan, calibrate, find_group_sets, make_plan
from lit_prune.groups import count_parameters
from lit_prune.ranking.registry import criteria, register_criterion

TOLERANCE = 0.002
Loss = Callable[[nn.Module, Any], Tensor]


def by_torch_pruning(
    model: nn.Module, batches: Sequence[Any], loss: Loss, parameters: int, importance: str, *, everywhere: bool
) -> nn.Module:
    """torch-pruning's BasePruner on heads and MLP channels; its ratio that leaves about ``parameters`` is searched for."""
    dense: Any = copy.deepcopy(model)
    dense.set_attn_implementation("eager")
    for batch in batches if importance == "taylor" else ():
        (loss(dense, batch) / len(batches)).backward()
    before, low, high, best = count_parameters(dense), 0.0, 0.95, None
    for _ in range(10):
        ratio = (low + high) / 2
        pruned = copy.deepcopy(dense)
        for copied, parameter in zip(pruned.parameters(), dense.parameters(), strict=True):
            copied.grad = parameter.grad
        _cut(pruned, batches[0]["queries"], importance, ratio, everywhere)
        found = count_parameters(pruned)
        if best is None or abs(found - parameters) < abs(count_parameters(best) - parameters):
            best = pruned
        if abs(found - parameters) < TOLERANCE * before:
            break
        low, high = (ratio, high) if found > parameters else (low, ratio)
    assert best is not None
    return best


def _cut(model: Any, example: dict[str, Tensor], importance: str, ratio: float, everywhere: bool) -> None:
    scores = {
        "taylor": torch_pruning.importance.GroupTaylorImportance(),
        "magnitude": torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
    }
    heads, ignored = {}, [model.embeddings, model.pooler]
    for layer in model.encoder.layer:
        attention = layer.attention.self
        heads |= dict.fromkeys((attention.query, attention.key, attention.value), attention.num_attention_heads)
        ignored += [layer.attention.output.dense, layer.output.dense]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = torch_pruning.pruner.BasePruner(
            model,
            example_inputs=dict(example),
            importance=scores[importance],
            global_pruning=everywhere,
            pruning_ratio=ratio,
            head_pruning_ratio=ratio,
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
            ignored_layers=[m for m in ignored if m is not None],
            output_transform=lambda output: output.last_hidden_state.sum(),
        )
    pruner.step()
    model.zero_grad()
    for layer in model.encoder.layer:
        attention = layer.attention.self
        attention.num_attention_heads = pruner.num_heads[attention.query]
        attention.all_head_size = attention.query.out_features


def wanda_sp(model: nn.Module, batches: Sequence[Any], loss: Loss, parameters: int, *, heads_up: bool) -> nn.Module:
    """Our implementation of Wanda-sp (An et al., AAAI 2024): the same share in every layer, without repair.

    With ``heads_up`` the number of heads removed from a layer is rounded up; channels make up the rest.
    """
    if "wanda_sp" not in criteria():
        register_criterion("wanda_sp", lambda w, norm: w.abs() * norm, "activation_l2", consumers_only=True)
    return uniform(model, batches, loss, parameters, "wanda_sp", heads_up=heads_up)


def uniform(
    model: nn.Module, batches: Sequence[Any], loss: Loss, parameters: int, importance: str, *, heads_up: bool
) -> nn.Module:
    """The lowest groups of a criterion, as many in every layer as a common share of heads and of channels allows."""
    group_sets = find_group_sets(model)
    config = PruningConfig(importance=importance, pruning_ratio=0.1, repair=None, iterations=1, compensation=False)
    statistics = calibrate(model, group_sets, batches, lambda batch: loss(model, batch), config)
    table, _ = make_plan(model, group_sets, statistics, config)
    budget = count_parameters(model) - parameters
    share = budget / sum(s.cost * s.size for s in group_sets)
    heads = [s for s in group_sets if s.kind == "attention"]
    channels = [s for s in group_sets if s.kind == "mlp"]
    fewer = min(int(share * heads[0].size) + heads_up, heads[0].size - 1)
    left = budget - sum(fewer * s.cost for s in heads)
    gone = {"attention": fewer, "mlp": min(left // sum(s.cost for s in channels), channels[0].size - 1)}
    kept = []
    for position, group_set in enumerate(group_sets):
        scores = torch.from_numpy(table.importance[table.offsets[position] : table.offsets[position + 1]])
        kept.append(scores.argsort()[gone[group_set.kind] :].sort().values.tolist())
    pruned = copy.deepcopy(model)
    apply_plan(pruned, PruningPlan.from_kept(group_sets, kept))
    return pruned
