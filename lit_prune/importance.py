"""Criteria of importance: small pure functions, tensors in, tensor out, and the registry that names them.

Every function takes a parameter and one statistic of the calibration and returns the importance of each element; the
importance of a group is the sum over its elements (:meth:`lit_prune.groups.Slice.gather`). A criterion is a sum of such
functions, so a mixed one, like ``taylor_2nd``, needs no code of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_prune import sharding
from lit_prune.groups import BLOCK, GroupSet, Slice
from lit_prune.reduction import add_line, product_lines
from lit_prune.statistics import ELEMENTWISE, GROUPWISE, STATISTICS, Statistics

NORMALIZATIONS = ("mean", "kind", "standard")


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    r"""First-order Taylor importance :math:`|\theta g|` of each element.

    With the mean gradient over the calibration batches this is the criterion ``taylor``; with the mean absolute
    gradient it is ``taylor_batch``, :math:`\frac1N\sum_i|\theta g_i|`.

    Args:
        weight: A parameter, any shape.
        gradient: Its gradient, same shape.

    Reference: Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, ICLR 2017.
    """
    return (weight * gradient).abs()


def second_order(weight: Tensor, squared_gradient: Tensor) -> Tensor:
    r"""Second-order term :math:`\tfrac12|\theta^2 h|` with the empirical-Fisher diagonal :math:`h=\frac1N\sum_i g_i^2`.

    Args:
        weight: A parameter, any shape.
        squared_gradient: Mean over batches of its squared gradient, same shape.

    Reference: LeCun et al., Optimal Brain Damage, NeurIPS 1989.
    """
    return 0.5 * (weight.square() * squared_gradient).abs()


def fisher(mask_gradient: Tensor) -> Tensor:
    r"""Empirical Fisher information of a mask of the groups, :math:`\frac1N\sum_i(\partial L_i/\partial m_j)^2`.

    A mask :math:`m_j`, 1 for a group that is there and 0 for one that is not, scales what the consumer reads of group j. Its
    derivative for sample i is :math:`\sum x\,\partial L_i/\partial x` over the sample's tokens and the group's features,
    so no weight needs a gradient (:mod:`lit_prune.masks`). Unlike a sum of element by element terms it knows which of
    them cancel. Where the inputs of a consumer cannot be observed (fused experts, convolutions) it is taken from the
    gradients of the weights, :math:`\sum_{\theta\in j}\theta g_i`, and a whole batch is one sample.

    Args:
        mask_gradient: The derivative by each group's mask, shape ``(samples, groups)``, or ``(groups,)`` for one sample.

    Returns:
        Tensor of the same shape, to be averaged over the samples.

    Reference: Kwon et al., A Fast Post-Training Pruning Framework for Transformers, NeurIPS 2022.
    """
    return mask_gradient.square()


def taylor_2nd(weight: Tensor, gradient: Tensor, squared_gradient: Tensor) -> Tensor:
    r"""Second-order Taylor importance :math:`|\theta g| + \tfrac12|\theta^2 h|` of each element.

    At a batch size of one the second term is far smaller than the first (it is a mean of squares of small numbers), and
    the ranking is nearly that of :func:`taylor`; ``second_order`` offers the second term alone.

    Args:
        weight: A parameter, any shape.
        gradient: Its mean gradient, same shape.
        squared_gradient: Mean over batches of its squared gradient, same shape.
    """
    return taylor(weight, gradient) + second_order(weight, squared_gradient)


def wanda(weight: Tensor, activation: Tensor) -> Tensor:
    r"""Wanda importance :math:`|\theta|A` of each element, A the magnitude of the input feature that it multiplies.

    Args:
        weight: A parameter, any shape.
        activation: Magnitude of each input feature (mean absolute value, L1 or L2 norm over the calibration tokens),
            of a shape that broadcasts against ``weight``. A bias multiplies the constant 1.

    Reference: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024.
    """
    return weight.abs() * activation


def output_wanda(weight: Tensor, activation: Tensor) -> Tensor:
    r"""Output-side Wanda :math:`\|W_{:,j}\|_2 A_j` of each input feature j of a consumer: what removing it does to the output.

    Args:
        weight: A projection's weight, shape ``(out_features, in_features)``.
        activation: L2 norm of each input feature over the calibration tokens, shape ``(in_features,)``.

    Returns:
        Tensor of shape ``(in_features,)``.

    Reference: Wanda-sp in An et al., Fluctuation-based Adaptive Structured Pruning for LLMs, AAAI 2024.
    """
    return weight.norm(dim=0) * activation


def fluctuation(weight: Tensor, variance: Tensor) -> Tensor:
    r"""FLAP's metric :math:`\mathrm{Var}(x_j)\,\|W_{:,j}\|_2^2` of each input feature j of a consumer.

    What the feature does beyond its mean, which a bias can make up for (``repair="bias"``).

    Args:
        weight: A projection's weight, shape ``(out_features, in_features)``.
        variance: Variance of each input feature over the calibration tokens, shape ``(in_features,)``.

    Returns:
        Tensor of shape ``(in_features,)``.

    Reference: An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models, AAAI 2024.
    """
    return weight.square().sum(dim=0) * variance


def magnitude(weight: Tensor) -> Tensor:
    r"""Magnitude :math:`|\theta|` of each element, a baseline that needs no data.

    Args:
        weight: A parameter, any shape.
    """
    return weight.abs()


def random(groups: int, generator: torch.Generator) -> Tensor:
    """Uniform random importance of each group, the baseline that every criterion has to beat.

    Args:
        groups: Number of groups.
        generator: Source of the numbers, on the CPU.

    Returns:
        Tensor of shape ``(groups,)``.
    """
    return torch.rand(groups, generator=generator)


@dataclass(frozen=True)
class Term:
    """One summand of a criterion.

    Args:
        function: Maps a parameter, and the statistic if there is one, to the importance of each element.
        statistic: Name of the statistic that ``function`` takes as its second argument, one of
            :data:`lit_prune.statistics.STATISTICS`, or ``None``.
        consumers_only: Whether only the slices that read the groups count (``o_proj``, ``down_proj``).
        per_group: Whether ``function`` takes the statistic alone, which is one number a group and batch.
        per_input: Whether ``function`` takes a consumer's weight as ``(out_features, in_features)`` and gives one number
            an input feature, in place of one an element.
        of_product: The same function for a single batch's gradient (or the mean gradient, if that is the statistic), given
            the product of weight and gradient, which it may change in place, element by element. Calibration then works through
            a parameter in small pieces.
    """

    function: Callable[..., Tensor]
    statistic: str | None = None
    consumers_only: bool = False
    per_input: bool = False
    per_group: bool = False
    of_product: Callable[[Tensor], Tensor] | None = None

    def applies(self, group_set: GroupSet, part: Slice) -> bool:
        """Whether the term counts this slice of a group set; whole blocks are scored by the sets in them."""
        if group_set.kind == BLOCK:
            return False
        if self.per_group:
            return any(part is s for s in group_set.masked)
        return part.consumes or not self.consumers_only


@dataclass(frozen=True)
class Criterion:
    """A named way to compute the importance of groups.

    Args:
        name: The name a user gives.
        terms: The summands.
        normalize: ``"mean"`` divides the importance of a group by the mean score of its (layer, kind), so that the
            mean score (importance / cost) is 1 everywhere and a global ranking compares each group with its own kind;
            ``"kind"`` does so for each kind over all layers; ``"standard"`` subtracts the mean score of its (layer, kind)
            and divides by the standard deviation, as FLAP does; ``None`` leaves the sums as they are, which is right for
            the criteria that estimate the loss.
    """

    name: str
    terms: tuple[Term, ...]
    normalize: str | None = None

    @property
    def statistics(self) -> frozenset[str]:
        """Names of the statistics that calibration has to provide."""
        return frozenset(t.statistic for t in self.terms if t.statistic is not None)


def _half_square(product: Tensor) -> Tensor:
    return product.square_().mul_(0.5)


_FIRST = Term(taylor, "gradient", of_product=torch.abs_)
_SECOND = Term(second_order, "squared_gradient", of_product=_half_square)

_REGISTRY: dict[str, Criterion] = {
    c.name: c
    for c in (
        Criterion("taylor", (_FIRST,)),
        Criterion("taylor_2nd", (_FIRST, _SECOND)),
        Criterion("taylor_batch", (Term(taylor, "absolute_gradient", of_product=torch.abs_),)),
        Criterion("fisher", (Term(fisher, "mask_gradient", per_group=True),)),
        Criterion("second_order", (_SECOND,)),
        Criterion("wanda", (Term(wanda, "activation_mean_abs"),), normalize="mean"),
        Criterion("output_wanda", (Term(output_wanda, "activation_l2", True, True),), normalize="mean"),
        Criterion("flap", (Term(fluctuation, "activation_variance", True, True),), normalize="standard"),
        Criterion("magnitude", (Term(magnitude),)),
        Criterion("random", ()),
    )
}


def register_criterion(
    name: str,
    function: Callable[..., Tensor],
    statistic: str | None = None,
    *,
    consumers_only: bool = False,
    normalize: str | None = None,
) -> Criterion:
    """Make a criterion of your own known under a name.

    Args:
        name: The name, which must be free.
        function: Maps a parameter, and the statistic if one is named, to the importance of each element, a tensor of
            the parameter's shape.
        statistic: One of :data:`lit_prune.statistics.STATISTICS`, or ``None``. With ``"mask_gradient"`` the function
            takes that alone, as :func:`fisher` does, and is averaged over the samples. With ``"absolute_gradient"`` and
            ``"squared_gradient"`` calibration in the mode ``"streaming"`` averages what the function gives for each batch,
            which is the function of the average only if it is linear in the statistic.
        consumers_only: Whether only the projections that read the groups count.
        normalize: See :class:`Criterion`.

    Raises:
        ValueError: If the name is taken, or the statistic or normalisation is unknown.

    Example::

        register_criterion("variance", lambda w, var: w.square() * var, "activation_variance", consumers_only=True)
    """
    if name in _REGISTRY:
        raise ValueError(f"There is a criterion named {name!r} already.")
    if statistic is not None and statistic not in STATISTICS:
        raise ValueError(f"Unknown statistic {statistic!r}; known are {', '.join(STATISTICS)}.")
    check_normalization(normalize)
    term = Term(function, statistic, consumers_only, per_group=statistic in GROUPWISE)
    criterion = Criterion(name, (term,), normalize)
    _REGISTRY[name] = criterion
    return criterion


def criteria() -> tuple[str, ...]:
    """Names of the known criteria."""
    return tuple(_REGISTRY)


def get_criterion(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        ValueError: If there is none; the message lists the known ones.
    """
    if name not in _REGISTRY:
        raise ValueError(f"Unknown importance criterion {name!r}; known are {', '.join(_REGISTRY)}.")
    return _REGISTRY[name]


def check_normalization(normalize: str | None) -> None:
    """Refuse an unknown normalisation.

    Raises:
        ValueError: If it is neither ``None`` nor one of :data:`NORMALIZATIONS`.
    """
    if normalize is not None and normalize not in NORMALIZATIONS:
        raise ValueError(f"Unknown normalisation {normalize!r}; expected None or one of {', '.join(NORMALIZATIONS)}.")


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
        total = torch.zeros(group_set.size)
        weights = [parameters[part.parameter] for part in group_set.slices]
        shared = sharding.any_sharded(weights)
        for position, (part, weight) in enumerate(zip(group_set.slices, weights, strict=True)):
            for term in criterion.terms:
                if not term.per_group and term.applies(group_set, part):
                    value = _term_importance(term, weight, group_set, position, statistics).cpu()
                    whole = term.per_input or not sharding.is_sharded(weight)
                    total += value if shared is None or not whole else sharding.once(value, shared)
        result.append(total if shared is None else sharding.sum_over_shards(total, shared))
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
        return sharding.gather(part, _line(term.function(sharding.local(weight)), part.dim), weight)
    assert statistics is not None
    if term.per_input:
        weight = sharding.full(weight)
        value = statistics.activation_of(part, term.statistic, weight).flatten()
        columns = term.function(weight.float().movedim(part.dim, -1).flatten(0, -2), value)
        return columns[part.index.to(columns.device)].sum(dim=1)
    streamed = statistics.reduced.get((term, group_set.key, position))
    if streamed is not None:
        return streamed
    if term.statistic in ELEMENTWISE:
        value = statistics.elementwise[term.statistic][part.parameter].to(weight.device)
        if term.statistic == "gradient" and term.of_product is not None:
            whole = sharding.local(weight)
            line = torch.zeros(whole.shape[part.dim], device=whole.device)
            product_lines(whole, value, [(term.of_product, part.dim, line)])
            return sharding.gather(part, line, weight)
    else:
        value = sharding.local_part(statistics.activation_of(part, term.statistic, weight), weight)
    return sharding.gather(part, _line(term.function(sharding.local(weight).float(), value), part.dim), weight)


def _line(values: Tensor, dim: int) -> Tensor:
    line = torch.zeros(values.shape[dim], dtype=torch.promote_types(values.dtype, torch.float32), device=values.device)
    add_line(line, values, dim)
    return line
