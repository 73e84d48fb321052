"""Repair of a model that loses hidden channels: whatever reads or writes the narrower stream is refitted, layer after layer.

As in :mod:`lit_prune.repair.refit` a dense and a pruned stream are followed through the blocks. The projections that read the
stream are refitted to what they give in the dense model, from the kept channels of the narrower norm before them; those that
write it, to the kept channels of what they give, and to the error of the stream before them. A norm over fewer channels
divides by another root mean square: its scale, channel by channel, takes up what regression of the dense norm's output on its
own says, so that also a head that is tied to the embedding, and cannot be refitted, reads what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.architectures.norms import norms_over_kept, scale_offset, stream_norms
from lit_prune.calibration.evaluation import evaluation_mode
from lit_prune.calibration.precision import accumulation_dtype
from lit_prune.distributed import shards
from lit_prune.errors import UnsupportedModelError
from lit_prune.groups import HIDDEN, GroupSet, Slice, is_inside
from lit_prune.modeling_pruned import sync_features
from lit_prune.plan import PruningPlan
from lit_prune.repair.calls import copy_to_cut
from lit_prune.repair.hidden_states import HiddenStates
from lit_prune.repair.normal_equations import NormalEquations
from lit_prune.repair.regression import _relative, ridge
from lit_prune.repair.replay import _adds_up, _run, _runs_when_cut, _trace
from lit_prune.repair.stream_calls import Unit, called_before, read_behind, units
from lit_prune.repair.streams import _record, _Stream
from lit_prune.surgery.apply import cut_block
from lit_prune.surgery.plan_cuts import parameter_cuts

# scales of norms change by no more than this factor: a channel that is nearly constant says nothing of its scale
_MOST = 4.0

Reduce = Callable[[Tensor], Tensor] | None


@torch.no_grad()
def refit_narrower(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    plan: PruningPlan,
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    *,
    damping: float,
    root: nn.Module | None = None,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
    all_reduce: Reduce = None,
) -> dict[str, Tensor]:
    """Refit what reads and writes the hidden states of a model that loses channels of them.

    Args:
        model: The dense model; it is not changed.
        group_sets: Its group sets, the hidden channels among them.
        plan: A plan that removes hidden channels, and maybe others.
        batches: Calibration batches; run once or, where a norm lies before the first block, twice.
        forward: Runs one batch through the model.
        damping: As of :func:`lit_prune.repair.refit.least_squares`.
        root: The module that holds the model, if ``forward`` runs more than the model.
        progress: Wraps the sequence of block names.
        all_reduce: Sums a tensor over the processes that calibrate on batches of their own, if there are several.

    Returns:
        New weights, in the shape after the cut, by parameter name.

    Raises:
        UnsupportedModelError: If the blocks cannot be run one after the other, or there is more than one stack of them.
    """
    channels = next(s for s in group_sets if s.kind == HIDDEN)
    kept = torch.tensor(next(e.kept for e in plan.entries if e.kind == HIDDEN))
    fit = _Refit(model, group_sets, channels, kept, plan, damping, all_reduce)
    with evaluation_mode(model if root is None else root):
        batches = list(batches)
        streams = _record(model, group_sets, batches, forward)
        if len(streams) != 1:
            raise UnsupportedModelError(
                f"{type(model).__name__} has {len(streams)} stacks of blocks; a narrower stream is followed through one."
                " Use repair=None."
            )
        stream = streams[0]
        shards.reshard(model)
        dense = stream.inputs
        pruned = fit.first_inputs(stream, batches, forward)
        gone = set(plan.removed_blocks)
        for name in progress(stream.blocks):
            block = shards.plain_copy(model.get_submodule(name))
            if name in gone:
                dense = _run(block, dense, stream, name)
                stream.check_replay(name, dense[0])
                continue
            dense, pruned = fit.block(name, block, dense, pruned, stream)
        fit.behind(stream, dense, pruned, batches, forward)
    return fit.weights


class _Refit:
    """One refit of a narrower model."""

    def __init__(
        self,
        model: nn.Module,
        group_sets: Sequence[GroupSet],
        channels: GroupSet,
        kept: Tensor,
        plan: PruningPlan,
        damping: float,
        all_reduce: Reduce,
    ) -> None:
        self.model, self.group_sets, self.channels, self.plan = model, group_sets, channels, plan
        self.kept = kept.to(next(model.parameters()).device)
        self.damping, self.all_reduce = damping, all_reduce
        self.cuts = parameter_cuts(model, plan, group_sets)
        self.norms = stream_norms(model)
        self.weights: dict[str, Tensor] = {}

    def first_inputs(self, stream: _Stream, batches: Sequence[Any], forward: Callable[[Any], Any]) -> HiddenStates:
        """What the first block of the narrower model is called with."""
        first = self.model.get_submodule(stream.blocks[0])
        before = called_before(self.model, self.norms, first, lambda: forward(batches[0]))
        if not before:
            return HiddenStates(stream.storage, (x.index_select(-1, self.kept) for x in stream.inputs))
        with norms_over_kept(self.model, before, self.kept):
            again = _record(self.model, self.group_sets, batches, forward)[0]
        return HiddenStates(again.storage, (x.index_select(-1, self.kept) for x in again.inputs))

    def block(
        self, name: str, block: nn.Module, dense: HiddenStates, pruned: HiddenStates, stream: _Stream
    ) -> tuple[HiddenStates, HiddenStates]:
        """Refit one block; what it gives in the dense stream, and cut and refitted in the pruned one."""
        prefix = f"{name}."
        smaller = copy_to_cut(block, [n for n, _ in block.named_parameters(remove_duplicate=False)])
        cut_block(smaller, name, self.plan, self.group_sets, self.cuts)
        members = [s for s in self.group_sets if s.block == name]
        readers = {p.module.removeprefix(prefix): p for p in self.channels.repairable if is_inside(p.module, name)}
        consumers = {p.module.removeprefix(prefix): p for s in members for p in s.repairable if not s.routed}
        norms = [n.removeprefix(prefix) for n in self.norms if is_inside(n, name)]
        found = units(block, dense[0], stream.calls[name][0], readers, consumers, norms)
        following, given = self._dense(block, found, dense, stream, name)
        written = [u.paths[0] for u in found if u.parts and not u.reads]
        residual = _adds_up(dense[0], {p: given[0][p] for p in written}, following[0])
        for position, unit in enumerate(found):
            if unit.parts and not smaller.get_parameter(f"{unit.paths[0]}.weight").numel():
                continue
            earlier = [u.paths[0] for u in found[:position] if u.parts and not u.reads]
            with _runs_when_cut(name):
                sums = self._sums(smaller, unit, earlier, dense, pruned, given, stream, name, residual)
            self._solve(block, smaller, name, unit, sums)
        with _runs_when_cut(name):
            return following, _run(smaller, pruned, stream, name)

    def _dense(
        self, block: nn.Module, members: Sequence[Unit], dense: HiddenStates, stream: _Stream, name: str
    ) -> tuple[HiddenStates, list[dict[str, Tensor]]]:
        """What the dense block gives for every batch, what its readers read, and what its consumers give."""
        following = HiddenStates(stream.storage)
        given: list[dict[str, Tensor]] = []
        for x, call in zip(dense, stream.calls[name], strict=True):
            output, found = _trace(block, [u.paths[0] for u in members], x, call, name)
            assert output is not None
            if len(following) == 0:
                stream.check_replay(name, output)
            following.append(output)
            given.append({u.paths[0]: found[u.paths[0]][0 if u.reads else 1] for u in members})
        return following, given

    def _sums(
        self,
        smaller: nn.Module,
        unit: Unit,
        earlier: Sequence[str],
        dense: HiddenStates,
        pruned: HiddenStates,
        given: Sequence[Mapping[str, Tensor]],
        stream: _Stream,
        name: str,
        residual: bool,
    ) -> NormalEquations:
        """The normal equations of a unit, over all batches."""
        path, sums = unit.paths[0], NormalEquations()
        rows = self._kept_rows(unit.parts[0]) if unit.parts else torch.empty(0, dtype=torch.long)
        bias = getattr(smaller.get_submodule(path), "bias", None)
        for number, (x, narrow, call, mask) in enumerate(
            zip(dense, pruned, stream.calls[name], stream.masks, strict=True)
        ):
            _, found = _trace(smaller, [*earlier, path], narrow, call, name, until=path)
            inputs = found[path][0 if unit.parts else 1]
            wide = accumulation_dtype(inputs.dtype)
            target = given[number][path].to(wide)
            if unit.parts and not unit.reads:
                target = target.index_select(-1, rows)
                if residual and target.shape == narrow.shape:
                    target = target + (x.index_select(-1, self.kept).to(wide) - narrow.to(wide))
                    for before in (p for p in earlier if found[p][1].shape == narrow.shape):
                        wanted = given[number][before].index_select(-1, self.kept)
                        target = target + (wanted.to(wide) - found[before][1].to(wide))
                if bias is not None:
                    target = target - bias.to(wide)
            sums.add(inputs, target, mask)
        return sums

    def _kept_rows(self, part: Slice) -> Tensor:
        """The outputs of a layer that stay."""
        whole = self.model.get_parameter(part.parameter)
        dim = 1 - part.dim
        cut = next((c.kept for c in self.cuts.get(part.parameter, ()) if c.dim == dim), torch.arange(whole.shape[dim]))
        return cut.to(self.kept.device)

    def _solve(self, block: nn.Module, smaller: nn.Module, name: str, unit: Unit, sums: NormalEquations) -> None:
        """Give the layers of a unit, and the norm before them, their new weights."""
        gram, cross, tokens = sums.reduced(self.all_reduce)
        if unit.norm is not None:
            gram, cross = self._rescale(smaller.get_submodule(unit.norm), f"{name}.{unit.norm}", gram, cross)
        relative = _relative(self.damping, gram, tokens)
        # a norm alone has no parts
        for path, part in zip(unit.paths if unit.parts else (), unit.parts, strict=True):
            weight = smaller.get_parameter(f"{path}.weight")
            prior = weight.T if part.input_dim == 0 else weight
            wanted = cross
            if unit.reads:
                # what it gives in the dense model is its weight times its input
                whole = block.get_parameter(f"{path}.weight").detach()
                whole = (whole.T if part.input_dim == 0 else whole).index_select(0, self._kept_rows(part))
                wanted = whole.to(cross) @ cross
            solved = ridge(gram, wanted, prior, relative)
            weight.copy_(solved.T if part.input_dim == 0 else solved)
            self.weights[part.parameter] = weight.detach().clone()

    def _rescale(self, norm: Any, name: str, gram: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
        """Scale a norm so that each channel it gives is as near as it can be to that of the dense norm.

        Args:
            norm: The cut norm.
            name: Its name in the model.
            gram: Products of what it gives, shape ``(kept, kept)``.
            cross: Products of what the dense norm gives with it, shape ``(channels, kept)``.

        Returns:
            The same products once it is scaled.
        """
        own = gram.diagonal()
        factor = (cross[self.kept].diagonal() / own.clamp_min(torch.finfo(own.dtype).tiny)).nan_to_num(1.0)
        factor = torch.where(own > 0, factor.clamp(1 / _MOST, _MOST), 1.0)
        if getattr(norm, "bias", None) is not None:
            # what it gives is not in proportion to its scale
            return gram, cross
        offset = scale_offset(norm)
        norm.weight.copy_((norm.weight.to(factor) + offset) * factor - offset)
        self.weights[f"{name}.weight"] = norm.weight.detach().clone()
        return gram * factor * factor[:, None], cross * factor

    def behind(
        self,
        stream: _Stream,
        dense: HiddenStates,
        pruned: HiddenStates,
        batches: Sequence[Any],
        forward: Callable[[Any], Any],
    ) -> None:
        """Refit the norm behind the last block, and the heads that read all of what it gives."""
        inside = stream.blocks[0].rpartition(".")[0]
        outside = [n for n in self.norms if not is_inside(n, inside)]
        heads = {p.module: p for p in self.channels.repairable if not is_inside(p.module, inside)}
        last = self.model.get_submodule(stream.blocks[-1])
        found = read_behind(self.model, last, outside, list(heads), lambda: forward(batches[0]))
        if found is None:
            return
        name, readers = found
        whole = self.model.get_submodule(name)
        smaller = copy_to_cut(whole, [n for n, _ in whole.named_parameters()])
        for parameter in smaller.parameters():
            parameter.data = parameter.data.index_select(0, self.kept)
        sync_features(smaller)
        sums = NormalEquations()
        for x, narrow, mask, call in zip(dense, pruned, stream.masks, stream.calls[stream.blocks[-1]], strict=True):
            with call.precision.entered():
                wanted, given = whole(x), smaller(narrow)
            sums.add(given, wanted, mask)
        gram, cross, tokens = sums.reduced(self.all_reduce)
        gram, cross = self._rescale(smaller, name, gram, cross)
        written = {id(self.model.get_parameter(p.parameter)) for p in self.channels.slices if not p.consumes}
        for part in (heads[r] for r in readers):
            weight = self.model.get_parameter(part.parameter)
            if id(weight) in written or part.input_dim != 1:
                continue
            prior = weight.detach().index_select(1, self.kept)
            solved = ridge(gram, weight.detach().to(cross) @ cross, prior, _relative(self.damping, gram, tokens))
            self.weights[part.parameter] = solved


@torch.no_grad()
def scaled_norms(model: nn.Module, plan: PruningPlan) -> dict[str, Tensor]:
    r"""Return scales of norms for hidden states whose removed channels are small, without looking at data.

    A norm over n' of n channels divides by a root mean square that is :math:`\sqrt{n/n'}` times as large if the others were
    nothing, which the scale takes up.

    Args:
        model: The model, before the cut.
        plan: A plan that removes hidden channels.

    Returns:
        The scales after the cut, by parameter name, for :func:`lit_prune.apply_plan`.
    """
    entry = next(e for e in plan.entries if e.kind == HIDDEN)
    factor = (entry.size / len(entry.kept)) ** 0.5
    weights = {}
    for name in stream_norms(model):
        weight = model.get_parameter(f"{name}.weight").detach()
        offset = scale_offset(model.get_submodule(name))
        scaled = (weight.double() + offset) * factor - offset
        weights[f"{name}.weight"] = scaled.index_select(0, torch.tensor(entry.kept, device=weight.device)).to(weight)
    return weights
