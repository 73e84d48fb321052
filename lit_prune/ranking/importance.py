"""Importance of every group, from a criterion and the statistics of a calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_prune.calibration.reduce import add_line, product_lines
from lit_prune.calibration.statistic_registry import GradientStatistic, get_statistic
from lit_prune.calibration.statistics import Statistics
from lit_prune.calibration.terms import Term
from lit_prune.distributed import shards
from lit_prune.groups import BLOCK, GroupSet
from lit_prune.ranking.criteria import (
    random,
)
from lit_prune.ranking.registry import (
    Criterion,
)


@torch.no_grad()
def group_importance(
    criterion: Criterion,
    parameters: Mapping[str, Tensor],
    group_sets: Sequence[GroupSet],
    statistics: Statistics | None,
    *,
    normalize: str | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Importance of every group.

    Args:
        criterion: The criterion.
        parameters: The model's parameters by qualified name.
        group_sets: The group sets to score.
        statistics: What calibration collected for them; may be ``None`` if the criterion needs nothing.
        normalize: Normalisation, see :class:`Criterion`.
        seed: Seed of ``random``.

    Sharded parameters (FSDP2) are scored by their local shards, with one sum over the processes for each group set.

    A whole block (kind ``"block"``) is as important as all that is in it together; for terms of whole groups
    (``mask_gradient``) it is a group of its own, whose mask scales what the block adds to the hidden states. As there is one
    in each layer, blocks are normalised over the model.

    Returns:
        For every group set a float32 tensor of shape ``(groups,)`` on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    result = []
    for group_set in group_sets:
        if not criterion.terms and group_set.kind != BLOCK:
            result.append(random(group_set.size, generator))
            continue
        total = torch.zeros(group_set.size, dtype=torch.float32)
        weights = [parameters[part.parameter] for part in group_set.slices]
        shared = shards.any_sharded(weights)
        for position, (part, weight) in enumerate(zip(group_set.slices, weights, strict=True)):
            for term in criterion.terms:
                if not term.per_group and term.applies(group_set, part):
                    value = _term_importance(term, weight, group_set, position, statistics).cpu()
                    whole = term.per_input or not shards.is_sharded(weight)
                    total += value if shared is None or not whole else shards.once(value, shared)
        result.append(total if shared is None else shards.sum_over_shards(total, shared))
    _add_up_blocks(result, group_sets)
    for term in criterion.terms:
        if term.per_group:
            assert statistics is not None
            for total, group_set in zip(result, group_sets, strict=True):
                total += statistics.reduced[term, group_set.key, 0].cpu()
    return _normalized(result, group_sets, normalize)


def _add_up_blocks(importance: Sequence[Tensor], group_sets: Sequence[GroupSet]) -> None:
    """Give every whole block the sum of what is in it; sets whose parameters are all in another one's count with that."""
    for position, block in enumerate(group_sets):
        if block.kind != BLOCK:
            continue
        inside = {
            p: {s.parameter for s in group_set.slices}
            for p, group_set in enumerate(group_sets)
            if group_set.block == block.name and group_set.kind != BLOCK
        }
        for p, names in inside.items():
            if not any(names < others for others in inside.values()):
                importance[position].add_(importance[p].sum())


def _normalized(importance: list[Tensor], group_sets: Sequence[GroupSet], normalize: str | None) -> list[Tensor]:
    if normalize is None:
        return importance
    members: dict[tuple[int, str, str], list[int]] = {}
    for position, group_set in enumerate(group_sets):
        everywhere = normalize == "kind" or group_set.kind == BLOCK
        place = (0, "") if everywhere else (group_set.layer, group_set.block)
        members.setdefault((*place, group_set.kind), []).append(position)
    result = list(importance)
    for positions in members.values():
        cost = sum(group_sets[p].cost * group_sets[p].size for p in positions)
        mean = sum(float(importance[p].sum()) for p in positions) / cost
        scores = torch.cat([importance[p] / group_sets[p].cost for p in positions])
        deviation = float(scores.std(unbiased=False))
        for p in positions:
            if normalize == "standard" and deviation > 0:
                result[p] = (importance[p] / group_sets[p].cost - mean) / deviation * group_sets[p].cost
            elif normalize != "standard" and mean > 0:
                result[p] = importance[p] / mean
    return result


def mixed_importance(parts: Sequence[tuple[float, Sequence[Tensor]]], group_sets: Sequence[GroupSet]) -> list[Tensor]:
    """A weighted mix of importances, each scaled to sum to 1 over the model so that the weights mean something.

    Args:
        parts: Weight and importance of the groups (as from :func:`group_importance`) of every criterion.
        group_sets: The group sets; whole blocks, which hold other groups, are scaled but not in the sum.

    Returns:
        For every group set a tensor of shape ``(groups,)``.

    Raises:
        ValueError: If an importance does not have a positive sum (a ``"standard"`` normalisation has none).
    """
    result: list[Tensor] = []
    for weight, importance in parts:
        groups = (i for i, s in zip(importance, group_sets, strict=True) if s.kind != BLOCK)
        total = float(sum(float(i.double().sum()) for i in groups))
        if not total > 0:
            raise ValueError(f"An importance to be mixed must have a positive sum over the model; found {total}.")
        scaled = [i * (weight / total) for i in importance]
        result = scaled if not result else [a + b for a, b in zip(result, scaled, strict=True)]
    return result


def _term_importance(
    term: Term, weight: Tensor, group_set: GroupSet, position: int, statistics: Statistics | None
) -> Tensor:
    part = group_set.slices[position]
    if term.statistic is None:
        return shards.sum_by_group(part, _line(term.function(shards.local(weight).float()), part.dim), weight)
    assert statistics is not None
    if term.per_input:
        weight = shards.full(weight)
        value = statistics.activation_of(part, term.statistic, weight)
        groups = statistics.feature_groups(part, weight)
        columns = _per_input(term, weight.float(), part.dim, value, groups)
        return columns[part.index.to(columns.device)].sum(dim=1)
    streamed = statistics.reduced.get((term, group_set.key, position))
    if streamed is not None:
        return streamed
    known = get_statistic(term.statistic)
    if isinstance(known, GradientStatistic):
        value = statistics.elementwise[term.statistic][part.parameter].to(weight.device)
        if known.function is None and term.of_product is not None:
            whole = shards.local(weight)
            line = torch.zeros(whole.shape[part.dim], dtype=torch.float32, device=whole.device)
            product_lines(whole, value, [(term.of_product, part.dim, line)])
            return shards.sum_by_group(part, line, weight)
    else:
        value = shards.local_part(statistics.activation_of(part, term.statistic, weight), weight)
    return shards.sum_by_group(part, _line(term.function(shards.local(weight).float(), value), part.dim), weight)


def _per_input(term: Term, weight: Tensor, dim: int, statistic: Tensor, groups: int) -> Tensor:
    """A term's value of every position along the input dimension of a weight, a row being an output and a place in the kernel.

    Args:
        term: A term of input features.
        weight: The weight.
        dim: Its dimension that meets the features.
        statistic: The features' statistic, as from :meth:`Statistics.activation_of`.
        groups: Of a convolution, in how many groups of channels it is. A position stands for a channel in each of them,
            whose values add up.
    """
    if groups == 1:
        return term.function(weight.movedim(dim, -1).flatten(0, -2), statistic.flatten())
    rows = zip(weight.chunk(groups), statistic.flatten(1).chunk(groups), strict=True)
    values = [term.function(w.movedim(dim, -1).flatten(0, -2), line[0]) for w, line in rows]
    return torch.stack(values).sum(dim=0)


def _line(values: Tensor, dim: int) -> Tensor:
    line = torch.zeros(values.shape[dim], dtype=torch.promote_types(values.dtype, torch.float32), device=values.device)
    add_line(line, values, dim)
    return line
