"""Records what decoder layers are called with while batches are run, so that they can be run again one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from lit_prune.architectures.layers import hidden_output
from lit_prune.calibration.evaluation import is_observed
from lit_prune.calibration.module_checks import filled, relative_difference, tolerance
from lit_prune.calibration.precision import Precision
from lit_prune.calibration.statistics import SKIPPED
from lit_prune.calibration.token_masks import TokenMasks, recomputing
from lit_prune.errors import UnsupportedModelError
from lit_prune.groups import GroupSet
from lit_prune.repair.calls import BlockCall
from lit_prune.repair.hidden_states import HiddenStates, Storage
from lit_prune.repair.reruns import WAY_OUT
from lit_prune.torch_internals import tree_map, version_of

# values of a block's first output that are kept to check its replay by
_SAMPLE = 4096


# rounding adds up over the blocks before
_REPLAY_SLACK = 8.0


@dataclass
class _Stream:
    """The blocks of one stack (an encoder, a decoder) with the calls that calibration made of them."""

    blocks: list[str]
    storage: Storage
    inputs: HiddenStates
    calls: dict[str, list[BlockCall]] = field(default_factory=dict)
    masks: list[Tensor | None] = field(default_factory=list)
    # by block, of what its first call gave: a sample to check a replay by, and the precision that it was computed in
    first: dict[str, tuple[Tensor, torch.dtype]] = field(default_factory=dict)
    # how many of the inputs are of batches that ran to their end
    complete: int = 0

    def add(self, hidden: Tensor, mask: Tensor | None) -> None:
        """Add a call of the first layer, and the positions that are real in it."""
        before = self.storage.offloads
        self.storage.count(hidden)
        if self.storage.offloads and not before:
            self.inputs.settle()
        self.inputs.append(hidden)
        self.masks.append(mask)

    def forget_batch(self) -> None:
        """Drop what was noted of a batch that is skipped after all."""
        self.inputs.truncate(self.complete)
        del self.masks[self.complete :]
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
                f" difference {apart:.3g}): it depends on a cache or another state. {WAY_OUT}"
            )


def _sample(output: Tensor) -> tuple[Tensor, torch.dtype]:
    """Some values of an output, spread over all of it, and the precision of what is computed here."""
    dtype = Precision.current(output.device).autocast or output.dtype
    return output.detach().flatten()[:: max(1, output.numel() // _SAMPLE)].clone(), dtype


class StreamRecorder:
    """Notes what every decoder layer is called with, by hooks, and checks that the layers follow each other.

    What activation checkpointing computes anew in a backward pass is not noted again.

    Args:
        model: The model.
        group_sets: Its group sets.
        offload: Whether hidden states are held in CPU memory, see :class:`Storage`.

    Attributes:
        streams: The stacks of layers, with what was noted so far.
    """

    def __init__(self, model: nn.Module, group_sets: Sequence[GroupSet], offload: bool | None = None) -> None:
        stacks: dict[str, list[str]] = {}
        for group_set in (s for s in group_sets if s.block and s.repairable):
            blocks = stacks.setdefault(group_set.block.rpartition(".")[0], [])
            if group_set.block not in blocks:
                blocks.append(group_set.block)
        self.streams = []
        for blocks in stacks.values():
            storage = Storage(offload)
            self.streams.append(_Stream(blocks, storage, HiddenStates(storage), {b: [] for b in blocks}))
        self._model = model
        self._token_masks: TokenMasks | None = None
        # by the first layer of a stack, what its layer before gave, and how often that was written into then
        self._last: dict[str, tuple[Tensor, int]] = {}

    @contextlib.contextmanager
    def hooks(
        self,
        token_masks: TokenMasks,
        guard: Callable[[Callable[..., None]], Callable[..., None]] = lambda hook: hook,
    ) -> Iterator[None]:
        """Note what happens within.

        Args:
            token_masks: Tells which positions are real; it has to be entered first.
            guard: Wraps every hook.
        """
        self._token_masks = token_masks
        with contextlib.ExitStack() as stack:
            for name, stream in ((n, s) for s in self.streams for n in s.blocks):
                block = self._model.get_submodule(name)
                before, after = guard(self._before(stream, name)), guard(self._after(stream, name))
                stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(after).remove)
            yield

    def skip_batch(self) -> None:
        """Drop what was noted of a batch that does not count."""
        self._last.clear()
        for stream in self.streams:
            stream.forget_batch()

    def end_batch(self) -> None:
        """Keep what was noted of a batch that counts."""
        self._last.clear()
        for stream in self.streams:
            stream.complete = len(stream.inputs)

    def finish(self) -> list[_Stream]:
        """The streams, once all batches were run.

        Raises:
            UnsupportedModelError: If a layer was not called as often as the others.
        """
        for stream in self.streams:
            _check_calls(stream)
        return self.streams

    def _before(self, stream: _Stream, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not is_observed() or recomputing():
                return
            hidden, rest, named = _split(args, kwargs, name)
            if name == stream.blocks[0]:
                _refuse_filled_cache(args, kwargs, name)
                assert self._token_masks is not None
                stream.add(hidden.detach(), self._token_masks.of(hidden))
            elif (last := self._last.get(stream.blocks[0])) is None or not _is_unchanged(*last, hidden):
                raise UnsupportedModelError(
                    f"The input of {name} is not the output of the block before it, so the blocks cannot be repaired one"
                    " after the other. Use repair='bias' or repair=None."
                )
            rest, named = tree_map(_detached, (rest, named))
            stream.calls[name].append(BlockCall(rest, named, Precision.current(hidden.device)))

        return hook

    def _after(self, stream: _Stream, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if not is_observed() or recomputing():
                return
            states = _states(output, name)
            self._last[stream.blocks[0]] = states, version_of(states)
            if name not in stream.first:
                stream.first[name] = _sample(states)

        return hook


def _detached(value: Any) -> Any:
    """A value without a graph (a position bias has one while gradients are computed)."""
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


@torch.no_grad()
def _record(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    offload: bool | None = None,
) -> list[_Stream]:
    """Run the batches once and note what every block is called with; check that blocks follow each other."""
    token_masks = TokenMasks(model, [s.block for s in group_sets if s.block and s.repairable])
    recorder = StreamRecorder(model, group_sets, offload)
    with token_masks, recorder.hooks(token_masks):
        for batch in batches:
            token_masks.start_batch(batch)
            if forward(batch) is SKIPPED:
                recorder.skip_batch()
            else:
                recorder.end_batch()
    return recorder.finish()


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
            f" as its first argument or as hidden_states=. {WAY_OUT}"
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
                f" pieces), without which the blocks cannot be run again one after the other. {WAY_OUT}"
            )


def _states(output: Any, name: str) -> Tensor:
    """The hidden states that a block gives, checked."""
    states = hidden_output(output)
    if not isinstance(states, Tensor):
        raise UnsupportedModelError(
            f"{name} gives a {type(output).__name__}; expected hidden states, or a tuple that begins with them. {WAY_OUT}"
        )
    return states
