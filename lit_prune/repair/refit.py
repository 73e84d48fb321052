"""Repairs the consumers (``o_proj``, ``down_proj``) of what leaves, from calibration data, before the cut.

``least_squares`` walks through the blocks of the model in order and follows two streams of hidden states: that of the
dense model, and that of the model as pruned and repaired so far. Every consumer is refitted by ridge regression so that,
on the pruned stream, the hidden states behind it come as near as they can to the dense ones; it thereby also makes up
for what earlier blocks got wrong. One copy of one block and five lists of hidden states of the calibration tokens are held
at a time (in CPU memory, where they would take too much of a device). A block runs twice over the calibration batches, once
as it is and once as pruned, and the former not where calibration recorded what it gives. Experts whose channels leave are
refitted each by itself, to what it gives on the pruned stream with all its channels.

Where the groups are not all in such blocks (convolutions, models found by running them), layers are refitted one after the
other in the order in which they run, see :mod:`lit_prune.repair.module_order`.

``bias`` only adds the mean of what leaves to the consumer's bias (An et al., FLAP, AAAI 2024).

The refit is that of reconstruction-based pruning (He et al., Channel Pruning, ICCV 2017; Ling et al., SlimGPT, NeurIPS
2024; Meng et al., OSSCAR, ICML 2024).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune._renamed import renamed_arguments
from lit_prune.architectures.arguments import positions_first
from lit_prune.calibration.evaluation import evaluation_mode
from lit_prune.distributed import shards
from lit_prune.groups import GroupSet, Slice
from lit_prune.plan import PruningPlan
from lit_prune.repair.calls import copy_to_cut
from lit_prune.repair.experts import expert_equations
from lit_prune.repair.hidden_states import HiddenStates
from lit_prune.repair.module_order import refit_in_order
from lit_prune.repair.normal_equations import NormalEquations
from lit_prune.repair.partial_runs import PartialRuns
from lit_prune.repair.passes import Data
from lit_prune.repair.recording import CallOutputs, Recording
from lit_prune.repair.regression import _relative, ridge
from lit_prune.repair.replay import (
    _runs_when_cut,
    is_chain,
)
from lit_prune.repair.routed import refit_routed
from lit_prune.repair.streams import _record, _Stream
from lit_prune.repair.targets import Targets, _following, _targets
from lit_prune.surgery.apply import cut_block
from lit_prune.surgery.plan_cuts import parameter_cuts
from lit_prune.surgery.tensors import DimensionCut

REPAIRS = ("least_squares", "bias")


# measured on SmolLM2-135M, 20% removed, 128 sequences of 128 tokens, perplexity over dense on text that nothing was fitted to:
# 1.365 at 4, 1.348 at 16, 1.371 at 64; on Python's documentation 2.05, 1.97, 1.97 (docs/quality.md)
DAMPING = 16.0


@torch.no_grad()
@renamed_arguments(total="all_reduce")
def least_squares(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    plan: PruningPlan,
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    *,
    damping: float | None = None,
    root: nn.Module | None = None,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
    recording: Recording | None = None,
    offload: bool | None = None,
) -> dict[str, Tensor]:
    """Refit every consumer of the blocks that a plan touches, and of those after them. Removed blocks are skipped.

    Args:
        model: The dense model; it is not changed.
        group_sets: Its group sets.
        plan: The plan.
        batches: Calibration batches.
        forward: Runs one batch through the model.
        damping: The damping of :func:`ridge` in units of inputs / tokens of each consumer: the more weights there are to fit
            for each calibration token, the less the fit is trusted. In the Bayesian reading of ridge regression it is the
            ratio of the variance of what no weights could fit to that of what the change of the weights contributes.
            :data:`DAMPING` if ``None``, and :data:`lit_prune.repair.module_order.DAMPING` where layers are refitted in the
            order in which they run.
        root: The module that holds the model, if ``forward`` runs more than the model.
        progress: Wraps the sequence of block names, for a progress bar.
        all_reduce: Sums a tensor over the processes that calibrate on batches of their own, if there are several.
        recording: What calibration recorded of the same model on the same batches; they are not run again then, and it is
            used up.
        offload: Whether hidden states are held in CPU memory where the model is on another device; ``None`` lets it depend on
            their size.

    Returns:
        New weights, in the shape after the cut, by parameter name, for :func:`lit_prune.apply_plan`.

    Raises:
        UnsupportedModelError: If the blocks cannot be run on their own, one after the other.
    """
    if not is_chain(model, group_sets):
        data = _again(batches, forward)
        return refit_in_order(
            model, group_sets, plan, data, damping=damping, root=root, progress=progress, all_reduce=all_reduce
        )
    damping = DAMPING if damping is None else damping
    cuts = parameter_cuts(model, plan, group_sets)
    touched = {e.key for e in plan.entries}
    gone = set(plan.removed_blocks)
    weights: dict[str, Tensor] = {}
    with evaluation_mode(model if root is None else root):
        streams = _record(model, group_sets, batches, forward, offload) if recording is None else recording.streams
        outputs = {} if recording is None else recording.outputs
        for stream in streams:
            shards.reshard(model)
            # from here on the hidden states are held by the walk alone
            dense, stream.inputs = stream.inputs, HiddenStates(stream.storage)
            pruned: HiddenStates | None = None
            for name in progress(stream.blocks):
                members = [s for s in group_sets if s.block == name]
                block = shards.plain_copy(model.get_submodule(name))
                if pruned is None and (name in gone or any(s.key in touched for s in members)):
                    pruned = dense.copy()
                if pruned is None or name in gone:
                    # the pruned stream passes a block that leaves by, and the blocks behind it make up for that
                    dense = _following(block, dense, stream, name, outputs.pop(name, None))
                    continue
                smaller = _smaller_copy(block, name, plan, group_sets, members, cuts)
                dense, refitted = _refit_layer(
                    model,
                    name,
                    block,
                    smaller,
                    members,
                    plan,
                    dense,
                    pruned,
                    outputs.pop(name, None),
                    stream,
                    damping,
                    all_reduce,
                )
                weights |= refitted
    return weights


def _again(batches: Iterable[Any], forward: Callable[[Any], Any]) -> Data:
    """Batches that are at hand, for several passes."""
    return lambda: contextlib.nullcontext((batches, forward))


def _refit_layer(
    model: nn.Module,
    name: str,
    block: nn.Module,
    smaller: nn.Module,
    members: Sequence[GroupSet],
    plan: PruningPlan,
    dense: HiddenStates,
    pruned: HiddenStates,
    recorded: Sequence[CallOutputs] | None,
    stream: _Stream,
    damping: float,
    all_reduce: Callable[[Tensor], Tensor] | None,
) -> tuple[HiddenStates, dict[str, Tensor]]:
    """Refit one layer; what it gives in the dense model, and the new weights by parameter name.

    What it gives as pruned and repaired takes the place of its inputs in ``pruned``.
    """
    parts = _consumers(name, members)
    following, targets = _targets(block, list(parts), dense, stream, name, recorded)
    with _runs_when_cut(name):
        # as much as the gradients of a backward pass take
        room = shards.held_bytes(model.parameters())
        runs = PartialRuns(smaller, name, targets.order, pruned, stream.calls[name], stream.storage, room)
    weights = _refit_consumers(model, name, smaller, parts, targets, pruned, runs, stream, damping, all_reduce)
    for output in _refit_all_experts(model, name, block, smaller, members, plan, stream, pruned, damping, all_reduce):
        # what consumers behind the experts read is no longer what it was
        runs.forget()
        weights[output] = _as_in(model, output, smaller.get_parameter(output.removeprefix(f"{name}.")))
    with _runs_when_cut(name):
        for number in range(len(pruned)):
            pruned[number] = runs.output(number)
    return following, weights


def _smaller_copy(
    block: nn.Module,
    name: str,
    plan: PruningPlan,
    group_sets: Sequence[GroupSet],
    members: Sequence[GroupSet],
    cuts: Mapping[str, Sequence[DimensionCut]],
) -> nn.Module:
    """A copy of a block, cut as planned; what is refitted in it is its own, all else shares the block's memory."""
    refitted = {part.parameter.removeprefix(f"{name}.") for s in members for part in s.consumers}
    smaller = copy_to_cut(block, refitted)
    cut_block(smaller, name, plan, group_sets, cuts)
    return smaller


def _solve(weight: Tensor, gram: Tensor, cross: Tensor, damping: float, *, transposed: bool) -> None:
    """Refit a weight in place, that of ``Conv1D`` (inputs first) transposed."""
    solved = ridge(gram, cross, weight.T if transposed else weight, damping)
    weight.copy_(solved.T if transposed else solved)


def _consumers(name: str, members: Sequence[GroupSet]) -> dict[str, Slice]:
    """The consumers in a layer that are refitted together, by path within it."""
    return {p.module.removeprefix(f"{name}."): p for s in members for p in s.repairable if not s.routed}


def _refit_consumers(
    model: nn.Module,
    name: str,
    smaller: nn.Module,
    parts: Mapping[str, Slice],
    targets: Targets,
    pruned: HiddenStates,
    runs: PartialRuns,
    stream: _Stream,
    damping: float,
    all_reduce: Callable[[Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    """Refit the consumers of a block one after the other; the new weights by parameter name."""
    refitted: dict[str, Tensor] = {}
    # in the order of the calls: what repairs one consumer changes the inputs of the next
    for path in (p for p in targets.order if smaller.get_parameter(f"{p}.weight").numel()):
        with _runs_when_cut(name):
            equations = _normal_equations(smaller, path, targets, pruned, runs, stream)
        gram, cross, tokens = equations.reduced(all_reduce)
        weight = smaller.get_parameter(f"{path}.weight")
        _solve(weight, gram, cross, _relative(damping, gram, tokens), transposed=parts[path].input_dim == 0)
        refitted[parts[path].parameter] = _as_in(model, parts[path].parameter, weight)
    return refitted


def _as_in(model: nn.Module, name: str, weight: Tensor) -> Tensor:
    """A refitted weight, sharded as the model's own is."""
    refitted, original = weight.detach().clone(), model.get_parameter(name)
    return shards.shard_like(refitted, original) if shards.is_sharded(original) else refitted


def _is_of_experts(model: nn.Module, group_set: GroupSet) -> bool:
    """Whether the groups are channels of experts whose weights are one tensor of three dimensions."""
    return any(
        part.unobservable_input and model.get_parameter(part.parameter).dim() == 3 for part in group_set.consumers
    )


def _refit_all_experts(
    model: nn.Module,
    name: str,
    block: nn.Module,
    smaller: nn.Module,
    members: Sequence[GroupSet],
    plan: PruningPlan,
    stream: _Stream,
    pruned: HiddenStates,
    damping: float,
    all_reduce: Callable[[Tensor], Tensor] | None,
) -> Iterator[str]:
    """Refit the experts of a block that lose channels, and give the name of each parameter once it has its new weights."""
    touched = {e.key for e in plan.entries}
    for group_set in (s for s in members if s.key in touched and _is_of_experts(model, s)):
        yield _refit_experts(model, block, smaller, group_set, members, plan, stream, pruned, damping, all_reduce)
    if routed := [s for s in members if s.key in touched and s.routed]:
        whole = _with_groups_of(routed, block, smaller, members, plan, model)
        paths = refit_routed(routed, name, whole, smaller, plan, pruned, stream.calls[name], damping, all_reduce)
        yield from (f"{name}.{path}" for path in paths)


def _refit_experts(
    model: nn.Module,
    block: nn.Module,
    smaller: nn.Module,
    group_set: GroupSet,
    members: Sequence[GroupSet],
    plan: PruningPlan,
    stream: _Stream,
    pruned: HiddenStates,
    damping: float,
    all_reduce: Callable[[Tensor], Tensor] | None,
) -> str:
    """Refit every expert, in the pruned stream, to what it gives there with all its channels; the parameter's name."""
    name, (part,) = group_set.block, group_set.consumers
    whole = _with_groups_of([group_set], block, smaller, members, plan, model)
    path, _, output = part.parameter.removeprefix(f"{name}.").rpartition(".")
    kept = next(torch.tensor(e.kept) for e in plan.entries if e.key == group_set.key)
    gram, cross, tokens = expert_equations(
        whole, path, output, part.dim, kept, pruned, stream.calls[name], stream.masks
    )
    if all_reduce is not None:
        gram, cross, tokens = all_reduce(gram), all_reduce(cross), all_reduce(tokens)
    weights = smaller.get_parameter(f"{path}.{output}")
    for expert, weight in enumerate(weights):
        # an expert that no token went to says nothing
        if float(gram[expert].diagonal().sum()) > 0:
            relative = _relative(damping, gram[expert], tokens[expert])
            _solve(weight, gram[expert], cross[expert], relative, transposed=part.dim != 2)
    return part.parameter


def _with_groups_of(
    group_sets: Sequence[GroupSet],
    block: nn.Module,
    smaller: nn.Module,
    members: Sequence[GroupSet],
    plan: PruningPlan,
    model: nn.Module,
) -> nn.Module:
    """A copy of a block that is cut and repaired like ``smaller``, but holds all groups of some sets."""
    whole_keys = {s.key for s in group_sets}
    others = [e for e in plan.entries if e.key in {s.key for s in members} - whole_keys]
    rest = replace(plan, entries=tuple(others), sets=())
    whole = copy_to_cut(block, ())
    cut_block(whole, members[0].block, rest, members, parameter_cuts(model, rest, members))
    state = smaller.state_dict()
    for key, parameter in whole.named_parameters():
        if state[key].shape == parameter.shape:
            parameter.data = state[key]
    return whole


def _normal_equations(
    smaller: nn.Module,
    path: str,
    targets: Targets,
    pruned: HiddenStates,
    runs: PartialRuns,
    stream: _Stream,
) -> NormalEquations:
    """The products of a consumer's inputs in the pruned stream with each other and with what it should give.

    It should give what it gives in the dense stream and, in a block that adds up, the residual stream's error before it.
    """
    equations = NormalEquations(batch_dim=int(bool(positions_first(smaller))))
    bias = getattr(smaller.get_submodule(path), "bias", None)
    for number, (x_pruned, mask) in enumerate(zip(pruned, stream.masks, strict=True)):
        given = runs.until(number, path)
        inputs = given[path][0]
        target = targets.of(number, path, x_pruned, {p: output for p, (_, output) in given.items()})
        if bias is not None:
            target = target - bias.to(target.dtype)
        equations.add(inputs, target, mask)
    return equations
