"""Other people's pruning, run for real on a Llama at a given number of parameters, for benchmarks/quality.py."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from lit_prune import Limits, PruningConfig, PruningPlan, apply_plan, calibrate, find_group_sets, make_plan, prune
from lit_prune.groups import count_parameters
from lit_prune.ranking.registry import criteria, register_criterion

TOLERANCE = 0.002
Loss = Callable[[nn.Module, Any], Tensor]


def torch_pruning(model: nn.Module, batches: Sequence[Tensor], parameters: int, importance: str) -> nn.Module:
    """torch-pruning's BasePruner with a global ranking and its support of grouped queries; heads and MLP channels leave.

    Its ratios are of heads and channels: the one that leaves about ``parameters`` is searched for. The residual stream stays
    whole, as in every other row.
    """
    dense: Any = copy.deepcopy(model)
    dense.set_attn_implementation("eager")
    if importance == "taylor":
        for batch in batches:
            (dense(input_ids=batch, labels=batch).loss / len(batches)).backward()
    before = count_parameters(dense)

    def cut(pruned: nn.Module, ratio: float) -> None:
        cut_by_torch_pruning(pruned, batches[0][:, :16], importance, ratio)

    return searched(dense, parameters, cut, first=1.25 * (before - parameters) / before, most=0.9, tries=8)


def searched(
    dense: nn.Module,
    parameters: int,
    cut: Callable[[nn.Module, float], None],
    *,
    first: float,
    most: float,
    tries: int,
) -> nn.Module:
    """A copy of a model, cut by the ratio that leaves about some number of parameters, which bisection searches for.

    Args:
        dense: The model; its copies have its gradients.
        parameters: The number.
        cut: Cuts a copy by a ratio, in place.
        first: The first ratio tried.
        most: The highest.
        tries: How many are tried.
    """
    low, high, ratio, best = 0.0, most, first, None
    for _ in range(tries):
        pruned = copy.deepcopy(dense)
        for copied, parameter in zip(pruned.parameters(), dense.parameters(), strict=True):
            copied.grad = parameter.grad
        cut(pruned, ratio)
        found = count_parameters(pruned)
        if best is None or abs(found - parameters) < abs(count_parameters(best) - parameters):
            best = pruned
        if abs(found - parameters) < TOLERANCE * count_parameters(dense):
            break
        low, high = (ratio, high) if found > parameters else (low, ratio)
        ratio = (low + high) / 2
    assert best is not None
    return best


def cut_by_torch_pruning(model: Any, example: Tensor, importance: str, ratio: float) -> None:
    """Cut a Llama with eager attention, in place; ``"taylor"`` takes the gradients that its parameters have.

    The rotation of queries and keys by transformers 5 is put aside while torch-pruning traces: building its groups does not
    end otherwise (the indices that it maps through splits and concatenations grow in a circle).
    """
    heads, ignored = {}, [model.lm_head, model.model.embed_tokens]
    for layer in model.model.layers:
        heads[layer.self_attn.q_proj] = model.config.num_attention_heads
        heads[layer.self_attn.k_proj] = heads[layer.self_attn.v_proj] = model.config.num_key_value_heads
        ignored += [layer.self_attn.o_proj, layer.mlp.down_proj]
    scores = {
        "taylor": tp.importance.GroupTaylorImportance(),
        "magnitude": tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
    }
    rotate = modeling_llama.apply_rotary_pos_emb
    modeling_llama.apply_rotary_pos_emb = lambda query, key, *_, **__: (query, key)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = tp.pruner.BasePruner(
                model,
                example_inputs=example,
                importance=scores[importance],
                global_pruning=True,
                pruning_ratio=ratio,
                head_pruning_ratio=ratio,
                num_heads=heads,
                prune_num_heads=True,
                prune_head_dims=False,
                ignored_layers=ignored,
                output_transform=lambda output: output.logits.sum(),
            )
    finally:
        modeling_llama.apply_rotary_pos_emb = rotate
    pruner.step()
    model.zero_grad()
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features


def flap(
    model: nn.Module, batches: Sequence[Tensor], ratio: float, repair: Literal["bias", "least_squares"] = "bias"
) -> nn.Module:
    """FLAP (An et al., AAAI 2024): fluctuation standardised within each layer, one global threshold, means folded into biases."""
    config = PruningConfig(
        importance="flap",
        pruning_ratio=ratio,
        repair=repair,
        limits=Limits(min_fraction=0.0, multiple_of={}),
        iterations=1,
        compensation=False,
    )
    pruned: Any = copy.deepcopy(model)
    prune(pruned, batches, lambda batch: pruned(input_ids=batch, labels=batch).loss, config)
    return pruned


def causal_loss(model: Any, batch: Tensor) -> Tensor:
    """The loss of a language model on token ids."""
    return model(input_ids=batch, labels=batch).loss


def wanda_sp(model: nn.Module, batches: Sequence[Any], loss: Loss, parameters: int, *, heads_up: bool) -> nn.Module:
    """Wanda-sp (ibid.): mean over outputs of absolute weight times the norm of the input, the same ratio in every layer.

    With ``heads_up`` the number of heads removed from a layer is rounded up, else down; channels make up the rest.
    """
    if "wanda_sp" not in criteria():
        register_criterion("wanda_sp", lambda w, norm: w.abs() * norm, "activation_l2", consumers_only=True)
    group_sets = find_group_sets(model)
    config = PruningConfig(importance="wanda_sp", pruning_ratio=0.1, repair=None, iterations=1, compensation=False)
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
