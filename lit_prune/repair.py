"""Repairs the consumers (``o_proj``, ``down_proj``) of what leaves, from calibration data, before the cut.

``least_squares`` walks through the blocks of the model in order and follows two streams of hidden states: that of the
dense model, and that of the model as pruned and repaired so far. Every consumer is refitted by ridge regression so that,
on the pruned stream, the hidden states behind it come as near as they can to the dense ones; it thereby also makes up
for what earlier blocks got wrong. One copy of one block and a few hidden states of the calibration tokens are held at a
time, and a block runs about as often as in four forward passes over the calibration batches. Experts whose channels leave
are refitted each by itself, to what it gives on the pruned stream with all its channels.

``bias`` only adds the mean of what leaves to the consumer's bias (An et al., FLAP, AAAI 2024).

The refit is that of reconstruction-based pruning (He et al., Channel Pruning, ICCV 2017; Ling et al., SlimGPT, NeurIPS
2024; Meng et al., OSSCAR, ICML 2024).
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from lit_prune import sharding
from lit_prune.blocks import hidden_output
from lit_prune.errors import PlanError, PruningError, UnsupportedModelError
from lit_prune.evaluation import evaluation_mode
from lit_prune.expert_equations import Reached, expert_equations
from lit_prune.groups import BLOCK, GroupSet
from lit_prune.module_checks import filled, relative_difference, tolerance
from lit_prune.plan import AFTER, PruningPlan
from lit_prune.statistics import SKIPPED, Statistics
from lit_prune.surgery import cut_block, parameter_cuts
from lit_prune.token_masks import TokenMasks

log = logging.getLogger(__name__)

REPAIRS = ("least_squares", "bias")
# measured on SmolLM2-135M with 128 sequences of 128 tokens: twice or half of it is hardly worse, a tenth much
DAMPING = 4.0
SHARE_DAMPING = 0.1
# values of a block's first output that are kept to check its replay by
_SAMPLE = 4096
# rounding adds up over the blocks before
_REPLAY_SLACK = 8.0
_WAY_OUT = "Use repair='bias' or repair=None."


def ridge(gram: Tensor, cross: Tensor, prior: Tensor, damping: float = 0.01) -> Tensor:
    r"""Solve :math:`\min_W \|Y - XW^T\|^2 + \lambda\|W - W_0\|^2`, λ = ``damping`` times the mean of the Gram's diagonal.

    Args:
        gram: :math:`X^TX`, shape ``(inputs, inputs)``.
        cross: :math:`Y^TX`, shape ``(outputs, inputs)``.
        prior: :math:`W_0`, shape ``(outputs, inputs)``.
        damping: λ relative to the mean of the diagonal of ``gram``, at least 0.

    Returns:
        W, of the prior's dtype and shape; the prior itself, with a warning, if the system cannot be solved or the
        solution is not finite or fits worse than the prior.
    """
    g, c, w = gram.double(), cross.double(), prior.double()
    scale = float(g.diagonal().mean())
    # the floor keeps a rank-deficient system solvable; the boosts are for those that fail all the same
    for boost in (1.0, 1e3, 1e6):
        strength = max(damping, 1e-12) * boost * scale
        system = g.clone()
        system.diagonal().add_(strength)
        factor, info = torch.linalg.cholesky_ex(system)
        if int(info) != 0:
            continue
        solution = torch.cholesky_solve((c + strength * w).T, factor).T
        before, after = _misfit(w, g, c), _misfit(solution, g, c)
        if bool(solution.isfinite().all()) and after <= before + 1e-9 * abs(before):
            return solution.to(prior.dtype)
    log.warning("A consumer could not be refitted: its calibration inputs are ill-conditioned. It keeps its weights.")
    return prior


def _misfit(weight: Tensor, gram: Tensor, cross: Tensor) -> float:
    """``|Y - X W^T|^2`` less the constant ``|Y|^2``."""
    return float((weight @ gram * weight).sum() - 2 * (weight * cross).sum())


@torch.no_grad()
def bias_fold(
    model: nn.Module, group_sets: Sequence[GroupSet], plan: PruningPlan, statistics: Statistics
) -> tuple[PruningPlan, dict[str, Tensor]]:
    """Add what the removed groups give on average to the biases of their consumers; those without a bias get one.

    Args:
        model: The dense model; it is not changed.
        group_sets: Its group sets.
        plan: The plan.
        statistics: Statistics with the mean inputs of the consumers.

    Returns:
        The plan with the biases that it adds, and the new biases by parameter name, for :func:`lit_prune.apply_plan`.
    """
    by_key = {s.key: s for s in group_sets}
    biases: dict[str, Tensor] = {}
    for entry in plan.group_entries:
        group_set = by_key[entry.key]
        removed = group_set.kept_to_removed(entry.kept)
        for part in group_set.refittable:
            module = model.get_submodule(part.module)
            weight = sharding.full(model.get_parameter(part.parameter))
            columns = part.index[removed].flatten().to(weight.device)
            mean = statistics.activations[part.module].mean[columns].to(weight.device)
            lost = weight.index_select(part.dim, columns).double()
            lost = lost.T @ mean if part.dim == 0 else lost @ mean
            present = getattr(module, "bias", None)
            biases[f"{part.module}.bias"] = (lost if present is None else lost + sharding.full(present)).to(
                weight.dtype
            )
    added = {
        name.removesuffix(".bias"): value.numel()
        for name, value in biases.items()
        if getattr(model.get_submodule(name[:-5]), "bias", None) is None
    }
    info = dict(plan.info)
    if AFTER in info:
        info[AFTER] += sum(added.values())
    return replace(plan, biases=tuple(sorted({*plan.biases, *added})), info=info), biases


Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class _Stream:
    """The blocks of one stack (an encoder, a decoder) with the calls that calibration made of them."""

    blocks: list[str]
    inputs: list[Tensor] = field(default_factory=list)
    calls: dict[str, list[Call]] = field(default_factory=dict)
    masks: list[Tensor | None] = field(default_factory=list)
    # by block, of what its first call gave: a sample to check a replay by, and the precision that it was computed in
    first: dict[str, tuple[Tensor, torch.dtype]] = field(default_factory=dict)
    # how many of the inputs are of batches that ran to their end
    complete: int = 0

    def forget_batch(self) -> None:
        """Drop what was noted of a batch that is skipped after all."""
        del self.inputs[self.complete :], self.masks[self.complete :]
        if not self.complete:
            self.first.clear()
        for calls in self.calls.values():
            del calls[self.complete :]

    def check_replay(self, name: str, output: Tensor) -> None:
        """Refuse to go on if a block's first call gave something else in its replay than when it was recorded.

        Raises:
            UnsupportedModelError: If it did.
        """
        (replayed, own), (recorded, precision) = _sample(output), self.first[name]
        apart = relative_difference(replayed, recorded)
        if not apart <= tolerance(own, precision) * _REPLAY_SLACK:
            raise UnsupportedModelError(
                f"{name}, run on its own with what it was called with, does not give what it gave in the model (largest relative"
                f" difference {apart:.3g}): it depends on a cache or another state. {_WAY_OUT}"
            )


def _sample(output: Tensor) -> tuple[Tensor, torch.dtype]:
    """Some values of an output, spread over all of it, and the precision of what is computed here."""
    device = output.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else output.dtype
    return output.detach().flatten()[:: max(1, output.numel() // _SAMPLE)].clone(), dtype


@torch.no_grad()
def least_squares(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    plan: PruningPlan,
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    *,
    damping: float = DAMPING,
    root: nn.Module | None = None,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
    total: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Refit every consumer of the blocks that a plan touches, and of those after them. Blocks that leave are passed by.

    Args:
        model: The dense model; it is not changed.
        group_sets: Its group sets.
        plan: The plan.
        batches: Calibration batches.
        forward: Runs one batch through the model.
        damping: The damping of :func:`ridge` in units of inputs / tokens of each consumer: the more weights there are to fit
            for each calibration token, the less the fit is trusted. In the Bayesian reading of ridge regression it is the
            ratio of the variance of what no weights could fit to that of what the change of the weights contributes.
        root: The module that holds the model, if ``forward`` runs more than the model.
        progress: Wraps the sequence of block names, for a progress bar.
        total: Sums a tensor over the processes that calibrate on batches of their own, if there are several.

    Returns:
        New weights, in the shape after the cut, by parameter name, for :func:`lit_prune.apply_plan`.

    Raises:
        UnsupportedModelError: If the blocks cannot be run on their own, one after the other.
    """
    cuts = parameter_cuts(model, plan, group_sets)
    touched = {e.key for e in plan.entries}
    gone = set(plan.removed_blocks)
    weights: dict[str, Tensor] = {}
    with evaluation_mode(model if root is None else root):
        for stream in _record(model, group_sets, batches, forward):
            sharding.reshard(model)
            dense, pruned = stream.inputs, stream.inputs
            started = False
            for name in progress(stream.blocks):
                members = [s for s in group_sets if s.block == name]
                started = started or name in gone or any(s.key in touched for s in members)
                block = sharding.plain_copy(model.get_submodule(name))
                if not started or name in gone:
                    # the pruned stream passes a block that leaves by, and the blocks behind it make up for that
                    dense = _run(block, dense, stream, name)
                    stream.check_replay(name, dense[0])
                    pruned = pruned if started else dense
                    continue
                smaller = copy.deepcopy(block)
                cut_block(smaller, name, plan, group_sets, cuts)
                parts = {p.module.removeprefix(f"{name}."): p for s in members for p in s.refittable}
                following, wanted = _dense_pass(block, list(parts), dense, stream, name)
                # in the order of the calls: what repairs one consumer changes the inputs of the next
                order = list(wanted[0])
                residual = _adds_up(dense[0], wanted[0], following[0])
                for path in (p for p in order if smaller.get_parameter(f"{p}.weight").numel()):
                    with _runs_when_cut(name):
                        gram, cross, tokens = _normal_equations(
                            smaller, order, path, residual, dense, pruned, wanted, stream, name
                        )
                    if total is not None:
                        gram, cross, tokens = total(gram), total(cross), total(tokens)
                    weight = smaller.get_parameter(f"{path}.weight")
                    transposed = parts[path].input_dim == 0
                    solved = ridge(gram, cross, weight.T if transposed else weight, _relative(damping, gram, tokens))
                    weight.copy_(solved.T if transposed else solved)
                    weights[parts[path].parameter] = _as_in(model, parts[path].parameter, weight)
                for group_set in (s for s in members if s.key in touched and _is_of_experts(model, s)):
                    output = _refit_experts(
                        model, block, smaller, group_set, members, plan, stream, pruned, damping, total
                    )
                    weights[output] = _as_in(model, output, smaller.get_parameter(output.removeprefix(f"{name}.")))
                with _runs_when_cut(name):
                    dense, pruned = following, _run(smaller, pruned, stream, name)
    return weights


def _relative(damping: float, gram: Tensor, tokens: Tensor) -> float:
    return damping * gram.shape[-1] / max(float(tokens), 1.0)


def _as_in(model: nn.Module, name: str, weight: Tensor) -> Tensor:
    """A refitted weight, sharded as the model's own is."""
    refitted, original = weight.detach().clone(), model.get_parameter(name)
    return sharding.shard_like(refitted, original) if sharding.is_sharded(original) else refitted


def _is_of_experts(model: nn.Module, group_set: GroupSet) -> bool:
    """Whether the groups are channels of experts whose weights are one tensor of three dimensions."""
    return any(part.opaque and model.get_parameter(part.parameter).dim() == 3 for part in group_set.consumers)


def _refit_experts(
    model: nn.Module,
    block: nn.Module,
    smaller: nn.Module,
    group_set: GroupSet,
    members: Sequence[GroupSet],
    plan: PruningPlan,
    stream: _Stream,
    pruned: Sequence[Tensor],
    damping: float,
    total: Callable[[Tensor], Tensor] | None,
) -> str:
    """Refit every expert, in the pruned stream, to what it gives there with all its channels; the parameter's name."""
    name, (part,) = group_set.block, group_set.consumers
    others = [e for e in plan.entries if e.key in {s.key for s in members} - {group_set.key}]
    rest = replace(plan, entries=tuple(others), sets=())
    whole = copy.deepcopy(block)
    cut_block(whole, name, rest, members, parameter_cuts(model, rest, members))
    state = smaller.state_dict()
    for key, parameter in whole.named_parameters():
        if state[key].shape == parameter.shape:
            parameter.copy_(state[key])
    path, _, output = part.parameter.removeprefix(f"{name}.").rpartition(".")
    kept = next(torch.tensor(e.kept) for e in plan.entries if e.key == group_set.key)
    gram, cross, tokens = expert_equations(
        whole, path, output, part.dim, kept, pruned, stream.calls[name], stream.masks
    )
    if total is not None:
        gram, cross, tokens = total(gram), total(cross), total(tokens)
    weights = smaller.get_parameter(f"{path}.{output}")
    for expert, weight in enumerate(weights):
        # an expert that no token went to says nothing
        if float(gram[expert].diagonal().sum()) > 0:
            relative = _relative(damping, gram[expert], tokens[expert])
            solved = ridge(gram[expert], cross[expert], weight if part.dim == 2 else weight.T, relative)
            weight.copy_(solved if part.dim == 2 else solved.T)
    return part.parameter


@torch.no_grad()
def unexplained_shares(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    *,
    root: nn.Module | None = None,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
    total: Callable[[Tensor], Tensor] | None = None,
) -> dict[tuple[str, str], Tensor]:
    """What share of a group's contribution to its consumer's output the other groups there cannot make up for.

    It walks through the blocks one by one, as :func:`least_squares` does, and holds the Gram matrices of one block at a time.

    Args:
        model: The model; it is not changed.
        group_sets: Its group sets.
        batches: Calibration batches.
        forward: Runs one batch through the model.
        root: The module that holds the model, if ``forward`` runs more than the model.
        progress: Wraps the sequence of block names.
        total: Sums a tensor over the processes that calibrate on batches of their own, if there are several.

    Returns:
        By key of the group set, shares in (0, 1], tensors of shape ``(groups,)``; whole blocks have none. Empty if the
        consumers of other sets cannot be observed.

    Raises:
        UnsupportedModelError: If the blocks cannot be run on their own, one after the other.
    """
    scored = [s for s in group_sets if s.kind != BLOCK]
    if not all(s.block and len(s.refittable) == len(s.consumers) == 1 for s in scored):
        return {}
    shares: dict[tuple[str, str], Tensor] = {}
    with evaluation_mode(model if root is None else root):
        for stream in _record(model, scored, batches, forward):
            sharding.reshard(model)
            states = stream.inputs
            for name in progress(stream.blocks):
                block = sharding.plain_copy(model.get_submodule(name))
                parts = {s.refittable[0].module.removeprefix(f"{name}."): s for s in scored if s.block == name}
                grams: dict[str, Tensor] = {}
                tokens = torch.zeros((), device=states[0].device)
                following = []
                for x, call, mask in zip(states, stream.calls[name], stream.masks, strict=True):
                    output, traced = _trace(block, list(parts), x, call, name)
                    assert output is not None
                    following.append(output)
                    if len(following) == 1:
                        stream.check_replay(name, output)
                    select = mask if mask is not None else slice(None)
                    for path, (inputs, _) in traced.items():
                        a = inputs[select].reshape(-1, inputs.shape[-1])
                        a = a.to(torch.promote_types(a.dtype, torch.float32))
                        grams[path] = grams[path] + a.T @ a if path in grams else a.T @ a
                    tokens += len(a)
                if total is not None:
                    grams, tokens = {path: total(gram) for path, gram in grams.items()}, total(tokens)
                for path, group_set in parts.items():
                    part = group_set.refittable[0]
                    weight = block.get_parameter(f"{path}.weight").movedim(part.dim, -1)
                    relative = _relative(SHARE_DAMPING, grams[path], tokens)
                    shares[group_set.key] = unexplained_share(grams[path], weight, part.index, relative)
                states = following
    return shares


def unexplained_share(gram: Tensor, weight: Tensor, index: Tensor, damping: float) -> Tensor:
    r"""The share of what each group of inputs adds to an output that regression on the other inputs cannot explain.

    For one input that is :math:`1/(H_{jj}[H^{-1}]_{jj})`, with :math:`H=X^TX+\lambda I` one minus the squared multiple
    correlation of input j with the others. For several, :math:`R_g=([H^{-1}]_{gg})^{-1}` is what is left of their Gram
    matrix, and the share is :math:`\mathrm{tr}(W_gR_gW_g^T)/\mathrm{tr}(W_gH_{gg}W_g^T)`.

    Args:
        gram: :math:`X^TX`, shape ``(inputs, inputs)``.
        weight: The consumer's weight, shape ``(outputs, inputs)``.
        index: The inputs of every group, shape ``(groups, width)``.
        damping: λ relative to the mean of the diagonal of ``gram``.

    Returns:
        Tensor of shape ``(groups,)`` in (0, 1]; ones if the inverse cannot be computed.

    Reference: Hassibi & Stork, Optimal Brain Surgeon, NeurIPS 1992, on the inputs of one layer as in Frantar & Alistarh,
    Optimal Brain Compression, NeurIPS 2022.
    """
    system = gram.double()
    index = index.to(system.device)
    system.diagonal().add_(max(damping, 1e-9) * float(system.diagonal().mean()))
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info) != 0:
        return torch.ones(len(index), device=gram.device)
    inverse = torch.cholesky_inverse(factor)
    within = index[:, :, None], index[:, None, :]
    # torch's LU of a stack of matrices is wrong with several threads and MKL (pytorch issue 142815)
    factors, failed = torch.linalg.cholesky_ex(inverse[within])
    left = torch.cholesky_inverse(factors)
    left[failed != 0] = torch.nan
    columns = weight.double()[:, index].movedim(0, 1)
    before = torch.einsum("gow,gwv,gov->g", columns, system[within], columns)
    after = torch.einsum("gow,gwv,gov->g", columns, left, columns)
    share = (after / before.clamp_min(torch.finfo(torch.float64).tiny)).clamp(1e-6, 1.0)
    return torch.where(share.isfinite(), share, 1.0).float()


@torch.no_grad()
def _record(
    model: nn.Module, group_sets: Sequence[GroupSet], batches: Iterable[Any], forward: Callable[[Any], Any]
) -> list[_Stream]:
    """Run the batches once and note what every block is called with; check that blocks follow each other."""
    stacks: dict[str, list[str]] = {}
    for group_set in (s for s in group_sets if s.block and s.refittable):
        blocks = stacks.setdefault(group_set.block.rpartition(".")[0], [])
        if group_set.block not in blocks:
            blocks.append(group_set.block)
    streams = [_Stream(blocks, calls={b: [] for b in blocks}) for blocks in stacks.values()]
    token_masks = TokenMasks(model, [block for stream in streams for block in stream.blocks])
    last: dict[str, Tensor] = {}

    def hook(stream: _Stream, name: str) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, rest, named = _split(args, kwargs, name)
            if name == stream.blocks[0]:
                _refuse_filled_cache(args, kwargs, name)
                stream.inputs.append(hidden.detach())
                stream.masks.append(token_masks.of(hidden))
            elif not torch.equal(last[stream.blocks[0]], hidden):
                raise UnsupportedModelError(
                    f"The input of {name} is not the output of the block before it, so the blocks cannot be repaired one"
                    " after the other. Use repair='bias' or repair=None."
                )
            stream.calls[name].append((rest, named))

        return before

    def after(stream: _Stream, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            states = last[stream.blocks[0]] = _states(output, name)
            if name not in stream.first:
                stream.first[name] = _sample(states)

        return hook

    with contextlib.ExitStack() as stack:
        stack.enter_context(token_masks)
        for name, stream in ((n, s) for s in streams for n in s.blocks):
            block = model.get_submodule(name)
            stack.callback(block.register_forward_pre_hook(hook(stream, name), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(after(stream, name)).remove)
        for batch in batches:
            token_masks.start_batch(batch)
            if forward(batch) is SKIPPED:
                for stream in streams:
                    stream.forget_batch()
            else:
                for stream in streams:
                    stream.complete = len(stream.inputs)
    for stream in streams:
        for name, calls in stream.calls.items():
            if len(calls) != len(stream.inputs):
                raise UnsupportedModelError(
                    f"{name} was called {len(calls)} times and {stream.blocks[0]} {len(stream.inputs)} times, so the blocks"
                    " cannot be repaired one after the other. Use repair='bias' or repair=None."
                )
    return streams


def _split(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states that a block is called with, and everything else. Caches are left out: they would remember."""
    named = {k: v for k, v in kwargs.items() if k != "use_cache" and not isinstance(v, Cache)}
    if args:
        hidden, rest = args[0], tuple(None if isinstance(a, Cache) else a for a in args[1:])
    else:
        hidden, rest = named.pop("hidden_states", None), ()
    if not isinstance(hidden, Tensor):
        raise UnsupportedModelError(
            f"{name} was called with {[type(a).__name__ for a in args]} and {sorted(kwargs)}; expected hidden states, a tensor,"
            f" as its first argument or as hidden_states=. {_WAY_OUT}"
        )
    return hidden, rest, named


def _refuse_filled_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> None:
    """Refuse a first block that is called with a cache of earlier tokens: prefix tuning, a sequence in several pieces.

    Raises:
        UnsupportedModelError: If the cache holds tokens.
    """
    for cache in (c for c in (*args, *kwargs.values()) if isinstance(c, Cache)):
        if length := filled(cache):
            raise UnsupportedModelError(
                f"{name} is called with a cache that holds {length} tokens already (prefix tuning, or a sequence in several"
                f" pieces), without which the blocks cannot be run again one after the other. {_WAY_OUT}"
            )


def _states(output: Any, name: str) -> Tensor:
    """The hidden states that a block gives, checked."""
    states = hidden_output(output)
    if not isinstance(states, Tensor):
        raise UnsupportedModelError(
            f"{name} gives a {type(output).__name__}; expected hidden states, or a tuple that begins with them. {_WAY_OUT}"
        )
    return states


@contextlib.contextmanager
def _replayed(name: str) -> Iterator[None]:
    """Turn an error in a block that is run on its own into one that says so.

    Raises:
        UnsupportedModelError: In place of what the block raised; memory that runs out, and our own errors, stay.
    """
    try:
        yield
    except (Reached, PruningError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} cannot be run on its own with what it was called with in the model ({type(error).__name__}: {error})."
            f" {_WAY_OUT}"
        ) from error


@contextlib.contextmanager
def _runs_when_cut(name: str) -> Iterator[None]:
    """Refuse a plan under which a block, which ran on its own before, does not run any more.

    Raises:
        PlanError: If it does not.
    """
    try:
        yield
    except UnsupportedModelError as error:
        raise PlanError(
            f"{name} runs on its own as it is, but not once it is cut as planned: {error.__cause__ or error}. Does its forward"
            " take sizes from an attribute that its description does not name, or from the width of its input?"
        ) from error


def _run(block: nn.Module, inputs: Sequence[Tensor], stream: _Stream, name: str) -> list[Tensor]:
    with _replayed(name):
        return [
            _states(block(x, *args, **kwargs), name)
            for x, (args, kwargs) in zip(inputs, stream.calls[name], strict=True)
        ]


def _trace(
    block: nn.Module, paths: Sequence[str], x: Tensor, call: Call, name: str, until: str | None = None
) -> tuple[Tensor | None, dict[str, tuple[Tensor, Tensor]]]:
    """Run a block; give its output, and the input and output of some projections in it, in the order of their calls.

    With ``until`` the forward ends behind that projection, and there is no output.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(path: str) -> Callable[..., None]:
        def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            # some blocks flatten batch and tokens before a projection, some add to what it gives in place
            shape = x.shape[:-1]
            found[path] = (
                args[0].reshape(*shape, args[0].shape[-1]),
                output.reshape(*shape, output.shape[-1]).clone(),
            )
            if path == until:
                raise Reached

        return after

    handles = [block.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    try:
        with _replayed(name):
            return _states(block(x, *call[0], **call[1]), name), found
    except Reached:
        return None, found
    finally:
        for handle in handles:
            handle.remove()


def _dense_pass(
    block: nn.Module, paths: Sequence[str], inputs: Sequence[Tensor], stream: _Stream, name: str
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """What the dense block and its consumers give for every batch."""
    outputs: list[Tensor] = []
    wanted = []
    for x, call in zip(inputs, stream.calls[name], strict=True):
        output, traced = _trace(block, paths, x, call, name)
        assert output is not None
        if not outputs:
            stream.check_replay(name, output)
        outputs.append(output)
        wanted.append({path: produced for path, (_, produced) in traced.items()})
    return outputs, wanted


def _adds_up(x: Tensor, consumed: Mapping[str, Tensor], output: Tensor) -> bool:
    """Whether a block gives its input plus what its consumers give, so that a later one can make up for an error."""
    total = x + sum(consumed.values())
    return bool(torch.allclose(output, total, rtol=1e-2, atol=1e-2 * float(output.abs().mean())))


def _normal_equations(
    smaller: nn.Module,
    order: Sequence[str],
    path: str,
    residual: bool,
    dense: Sequence[Tensor],
    pruned: Sequence[Tensor],
    wanted: Sequence[Mapping[str, Tensor]],
    stream: _Stream,
    name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The Gram matrix of a consumer's inputs in the pruned stream, their products with what it should give, and their number.

    It should give what it gives in the dense stream and, in a block that adds up, the residual stream's error before it.
    """
    gram = cross = None
    tokens = torch.zeros((), device=dense[0].device)
    bias = getattr(smaller.get_submodule(path), "bias", None)
    earlier = order[: order.index(path)]
    for number, (x_dense, x_pruned, call, mask) in enumerate(
        zip(dense, pruned, stream.calls[name], stream.masks, strict=True)
    ):
        given = _trace(smaller, order, x_pruned, call, name, until=path)[1]
        inputs, target = given[path][0], wanted[number][path]
        if residual:
            target = target + (x_dense - x_pruned)
            for before in earlier:
                target = target + (wanted[number][before] - given[before][1])
        if bias is not None:
            target = target - bias
        select = mask if mask is not None else slice(None)
        precision = torch.promote_types(inputs.dtype, torch.float32)
        a = inputs[select].reshape(-1, inputs.shape[-1]).to(precision)
        b = target[select].reshape(-1, target.shape[-1]).to(precision)
        tokens += len(a)
        gram = a.T @ a if gram is None else gram + a.T @ a
        cross = b.T @ a if cross is None else cross + b.T @ a
    assert gram is not None
    assert cross is not None
    return gram, cross, tokens
