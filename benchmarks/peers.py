"""One-shot quality of other tools and published recipes, on the protocol of benchmarks/quality.py and the same budget.

Rows, each brought to the same number of parameters as ours by bisecting its own ratio:

* torch-pruning 1.6.1, global pruning with its grouped-query support, Taylor and magnitude importance: once as it comes, where it
  also narrows the hidden size of the model, and once with the hidden size left alone;
* Wanda-sp: output-side Wanda, the same fraction of every layer's attention and MLP, no repair;
* FLAP: variance metric, standardised over each layer, one global threshold, bias compensation.

The last two (An et al., AAAI 2024) are the published formulas and allocations, run on our engine.

    python benchmarks/peers.py --text wikitext2-valid.txt --output docs/quality.json
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from lit_prune.groups import count_parameters
from lit_prune.selection import Limits

OURS: dict[str, dict[str, Any]] = {
    "Wanda-sp": {"importance": "output_wanda", "repair": None, "limits": Limits(uniform=True, min_fraction=0.0)},
    "FLAP": {"importance": "flap", "repair": "bias", "limits": Limits(min_fraction=0.0)},
}
TORCH_PRUNING = ("taylor", "magnitude")


def torch_pruned(
    model: nn.Module, importance: str, batches: Sequence[torch.Tensor], target: int, hidden: bool
) -> tuple[nn.Module, float]:
    """Prune a copy with torch-pruning, to as many parameters as ``target`` as it comes; also give the ratio it took."""
    low, high, best = 0.0, 0.9, None
    gradients: dict[str, torch.Tensor] = {}
    if importance == "taylor":
        for batch in batches:
            (model(input_ids=batch, labels=batch).loss / len(batches)).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
    for _ in range(7):
        ratio = (low + high) / 2
        pruned = copy.deepcopy(model)
        for name, parameter in pruned.named_parameters():
            parameter.grad = gradients[name].clone() if name in gradients else None
        narrow(pruned, importance, ratio, hidden, batches[0])
        found = count_parameters(pruned)
        if best is None or abs(found - target) < abs(count_parameters(best[0]) - target):
            best = (pruned, ratio)
        low, high = (ratio, high) if found > target else (low, ratio)
    assert best is not None
    best[0].zero_grad(set_to_none=True)
    return best


def narrow(model: nn.Module, importance: str, ratio: float, hidden: bool, example: torch.Tensor) -> None:
    """One run of torch-pruning's BasePruner, set up as its own example for language models does."""
    heads: dict[nn.Module, int] = {}
    ignored: list[nn.Module] = [model.lm_head]
    config = model.config
    for module in model.modules():
        if hasattr(module, "q_proj"):
            heads[module.q_proj] = config.num_attention_heads
            heads[module.k_proj] = heads[module.v_proj] = config.num_key_value_heads
            if not hidden:
                ignored.append(module.o_proj)
        elif hasattr(module, "down_proj") and not hidden:
            ignored.append(module.down_proj)
    if not hidden:
        ignored.append(model.get_input_embeddings())
    model.config.use_cache = False
    score = {
        "taylor": tp.importance.GroupTaylorImportance(),
        "magnitude": tp.importance.GroupMagnitudeImportance(p=2),
    }[importance]
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs={"input_ids": example},
        importance=score,
        global_pruning=True,
        pruning_ratio=ratio,
        max_pruning_ratio=0.8,
        head_pruning_ratio=ratio,
        ignored_layers=ignored,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        output_transform=lambda out: out.logits.sum(),
    )
    pruner.step()
    for module in model.modules():
        if hasattr(module, "q_proj"):
            module.num_key_value_groups = module.q_proj.out_features // module.k_proj.out_features
        if isinstance(module, nn.Embedding):
            module.embedding_dim = module.weight.shape[1]
    # the head is the embedding: torch-pruning cuts one weight and leaves the other name at the old one
    model.lm_head.weight = model.get_input_embeddings().weight
