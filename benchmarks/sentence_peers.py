"""Other people's pruning of a BERT encoder, at a given number of parameters, for benchmarks/sentence_quality.py."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch_pruning
from peers import Loss, searched
from torch import Tensor, nn


def by_torch_pruning(
    model: nn.Module, batches: Sequence[Any], loss: Loss, parameters: int, importance: str, *, everywhere: bool
) -> nn.Module:
    """torch-pruning's BasePruner on heads and MLP channels; its ratio that leaves about ``parameters`` is searched for."""
    dense: Any = copy.deepcopy(model)
    dense.set_attn_implementation("eager")
    for batch in batches if importance == "taylor" else ():
        (loss(dense, batch) / len(batches)).backward()

    def cut(pruned: nn.Module, ratio: float) -> None:
        _cut(pruned, batches[0]["queries"], importance, ratio, everywhere)

    return searched(dense, parameters, cut, first=0.475, most=0.95, tries=10)


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
