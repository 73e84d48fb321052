"""Records the calls of decoder layers in calibration, and runs the layers again one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from lit_prune.architectures.features import is_convolution
from lit_prune.architectures.layers import hidden_output
from lit_prune.calibration.evaluation import is_observed
from lit_prune.calibration.module_checks import filled, relative_difference, tolerance
from lit_prune.calibration.precision import Precision, accumulation_dtype
from lit_prune.calibration.statistics import SKIPPED
from lit_prune.calibration.token_masks import TokenMasks
from lit_prune.errors import PlanError, PruningError, UnsupportedModelError
from lit_prune.groups import BLOCK, HIDDEN, GroupSet
from lit_prune.repair.calls import BlockCall
from lit_prune.repair.experts import StopForward
from lit_prune.torch_internals import version_of

# values of a block's first output that are kept to check its replay by
_SAMPLE = 4096


# rounding adds up over the blocks before
_REPLAY_SLACK = 8.0


# how much of what its consumers add may be missing from the output of a block that counts as a sum
_MISSING = 1e-2


_WAY_OUT = "Use repair='bias' or repair=None."


def is_chain(model: nn.Module, group_sets: Sequence[GroupSet]) -> bool:
    """Whether all groups but hidden channels are in blocks that are described, and none is read by a convolution.

    Whether the blocks follow each other shows when they run.
    """
    return all(
        s.block and not any(is_convolution(model.get_submodule(p.module)) for p in s.repairable)
        for s in group_sets
        if s.kind not in (BLOCK, HIDDEN)
    )


@dataclass
class _Stream:
    """The blocks of one stack (an encoder, a decoder) with the calls that calibration made of them."""

    blocks: list[str]
    inputs: list[Tensor] = field(default_factory=list)
    calls: dict[str, list[BlockCall]] = field(default_factory=dict)
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
def _record(
    model: nn.Module, group_sets: Sequence[GroupSet], batches: Iterable[Any], forward: Callable[[Any], Any]
) -> list[_Stream]:
    """Run the batches once and note what every block is called with; check that blocks follow each other."""
    stacks: dict[str, list[str]] = {}
    for group_set in (s for s in group_sets if s.block and s.repairable):
        blocks = stacks.setdefault(group_set.block.rpartition(".")[0], [])
        if group_set.block not in blocks:
            blocks.append(group_set.block)
    streams = [_Stream(blocks, calls={b: [] for b in blocks}) for blocks in stacks.values()]
    token_masks = TokenMasks(model, [block for stream in streams for block in stream.blocks])
    last: dict[str, tuple[Tensor, int]] = {}

    def hook(stream: _Stream, name: str) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not is_observed():
                return
            hidden, rest, named = _split(args, kwargs, name)
            if name == stream.blocks[0]:
                _refuse_filled_cache(args, kwargs, name)
                stream.inputs.append(hidden.detach())
                stream.masks.append(token_masks.of(hidden))
            elif not _is_unchanged(*last[stream.blocks[0]], hidden):
                raise UnsupportedModelError(
                    f"The input of {name} is not the output of the block before it, so the blocks cannot be repaired one"
                    " after the other. Use repair='bias' or repair=None."
                )
            stream.calls[name].append(BlockCall(rest, named, Precision.current(hidden.device)))

        return before

    def after(stream: _Stream, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if not is_observed():
                return
            states = _states(output, name)
            last[stream.blocks[0]] = states, version_of(states)
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
        _check_calls(stream)
    return streams


def _is_unchanged(states: Tensor, version: int, hidden: Tensor) -> bool:
    """Whether hidden states are what a block gave: the same tensor, not written into since, or another of equal values.

    Args:
        states: What the block gave.
        version: How often that had been written into then.
        hidden: The hidden states to compare.
    """
    # comparing values would wait for the device
    return version_of(hidden) == version if hidden is states else torch.equal(states, hidden)


def _check_calls(stream: _Stream) -> None:
    """Refuse blocks that were not called as often as each other.

    Raises:
        UnsupportedModelError: If one was not.
    """
    for name, calls in stream.calls.items():
        if len(calls) != len(stream.inputs):
            raise UnsupportedModelError(
                f"{name} was called {len(calls)} times and {stream.blocks[0]} {len(stream.inputs)} times, so the blocks"
                " cannot be repaired one after the other. Use repair='bias' or repair=None."
            )


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
        if held := filled(cache):
            raise UnsupportedModelError(
                f"{name} is called with a cache that holds {held} already (prefix tuning, or a sequence in several"
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
    except (StopForward, PruningError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # the user's forward, called as it was not written to be called, may raise anything
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
        return [_states(call.run(block, x), name) for x, call in zip(inputs, stream.calls[name], strict=True)]


def _at_positions(features: Tensor, positions: torch.Size) -> Tensor:
    """Features with the dimensions of the positions, which some blocks flatten; as rows where they are of some positions only."""
    if features.shape[:-1].numel() != positions.numel():
        return features.reshape(-1, features.shape[-1])
    return features.reshape(*positions, features.shape[-1])


def _trace(
    block: nn.Module, paths: Sequence[str], x: Tensor, call: BlockCall, name: str, until: str | None = None
) -> tuple[Tensor | None, dict[str, tuple[Tensor, Tensor]]]:
    """Run a block; give its output, and the input and output of some projections in it, in the order of their calls.

    With ``until`` the forward ends behind that projection, and there is no output.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(path: str) -> Callable[..., None]:
        def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            # some blocks add in place to what a projection gives
            found[path] = (_at_positions(args[0], x.shape[:-1]), _at_positions(output, x.shape[:-1]).clone())
            if path == until:
                raise StopForward

        return after

    handles = [block.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    try:
        with _replayed(name):
            return _states(call.run(block, x), name), found
    except StopForward:
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
    """Whether a block gives its input plus what its consumers give, so that a later one can make up for an error.

    What is missing, beyond what the block's own precision rounds off, is compared by norm with what the consumers give.
    Consumers that give something else than hidden states (the time steps of a state-space model) are not among them.
    """
    wide = accumulation_dtype(output.dtype)
    given = [value.to(wide) for value in consumed.values() if value.shape == x.shape]
    if not given:
        return False
    added = sum(given[1:], start=given[0])
    size = sum((value.abs() for value in given), start=x.to(wide).abs())
    eps = max(torch.finfo(output.dtype).eps, torch.finfo(x.dtype).eps)
    rounding = (len(given) + 1) / 2 * eps * size
    missing = ((output.to(wide) - x.to(wide) - added).abs() - rounding).clamp_min(0)
    return bool(missing.norm() <= _MISSING * added.norm())
