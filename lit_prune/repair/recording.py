"""What calibration's own pass over the batches leaves for the repair, so that no other pass has to be run for it.

Always the inputs of the first decoder layer of a stack, with what else the layers are called with. While they fit a limit,
the Gram matrices of what consumers read, which say what a repair can make up for without another run of the layers; and
what the first layers and their consumers give, which the repair aims at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.architectures.layers import after_layer, hidden_input
from lit_prune.calibration.evaluation import evaluation_mode, is_observed
from lit_prune.calibration.statistics import SKIPPED
from lit_prune.calibration.token_masks import TokenMasks, recomputing
from lit_prune.distributed import shards
from lit_prune.errors import UnsupportedModelError
from lit_prune.groups import GroupSet
from lit_prune.repair.consumer_grams import ConsumerGrams, gram_bytes
from lit_prune.repair.replay import _at_positions
from lit_prune.repair.streams import StreamRecorder, _states, _Stream


@dataclass
class CallOutputs:
    """What one call of a decoder layer gave.

    Args:
        consumers: What its consumers gave, by path within the layer, in the order of their calls.
        output: The hidden states that the layer gave.
    """

    consumers: dict[str, Tensor] = field(default_factory=dict)
    output: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return sum(t.nbytes for t in (*self.consumers.values(), self.output) if t is not None)


class Recording:
    """Records a calibration pass, as an observer of :func:`lit_prune.calibration.collect.collect_statistics`.

    A model that cannot be recorded ends the recording, and not the calibration: :attr:`usable` is ``False`` then.

    Args:
        model: The model.
        group_sets: Its group sets.
        limit: Bytes that matrices and outputs may take together.
        grams: Whether Gram matrices are wanted.
        outputs: Whether what layers and their consumers give is wanted.
        offload: Whether hidden states are held in CPU memory where the model is on another device; ``None`` lets it depend on
            their size.

    Attributes:
        usable: Whether there is a recording.
        grams: The Gram matrices by path of the consumer; ``None`` if they are not wanted or do not fit.
        outputs: By layer, for as many of a stack's first layers as fit, what every call gave.
    """

    def __init__(
        self,
        model: nn.Module,
        group_sets: Sequence[GroupSet],
        limit: int,
        *,
        grams: bool,
        outputs: bool,
        offload: bool | None = None,
    ) -> None:
        self._model = model
        # by layer, the paths within it of the consumers whose inputs can be seen, and whether a router sends tokens there
        self._consumers: dict[str, dict[str, bool]] = {}
        for group_set in (s for s in group_sets if s.block):
            paths = self._consumers.setdefault(group_set.block, {})
            paths |= {p.module.removeprefix(f"{group_set.block}."): group_set.routed for p in group_set.repairable}
        # a sharded layer is gathered by all processes together, whatever one of them has recorded
        self._room = limit if shards.any_sharded(model.parameters()) is None else 0
        needed = gram_bytes(model, group_sets)
        self.grams = ConsumerGrams() if grams and 0 < needed <= self._room else None
        self._room -= needed if self.grams is not None else 0
        self._keeps_outputs = outputs and self._room > 0
        self.outputs: dict[str, list[CallOutputs]] = {}
        self.usable = True
        self._recorder = StreamRecorder(model, group_sets, offload)
        if self._keeps_outputs:
            self.outputs = {name: [] for stream in self._recorder.streams for name in stream.blocks}
        # of the batch at hand: what consumers read, by their layer, its call, and path within it
        self._read: dict[tuple[str, int, str], Tensor] = {}
        # the call of every layer that runs
        self._running: dict[str, tuple[torch.Size, CallOutputs]] = {}

    @contextlib.contextmanager
    def observed(self, token_masks: TokenMasks) -> Iterator[None]:
        """Record what happens within.

        Args:
            token_masks: Tells which positions are real; it has to be entered first.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._recorder.hooks(token_masks, self._guarded))
            for stream in self._recorder.streams:
                for name in stream.blocks if self.grams is not None or self._keeps_outputs else ():
                    self._watch(stream, name, stack)
            yield

    @torch.no_grad()
    def record(self, batches: Iterable[Any], forward: Callable[[Any], Any], root: nn.Module) -> None:
        """Record batches that calibration did not run.

        Args:
            batches: The batches.
            forward: Runs one batch through the model.
            root: The module that holds the model.
        """
        token_masks = TokenMasks(self._model, self._consumers)
        with evaluation_mode(root), token_masks, self.observed(token_masks):
            for batch in batches:
                token_masks.start_batch(batch)
                if forward(batch) is SKIPPED:
                    self.skip_batch()
                else:
                    self.take_batch()

    def take_batch(self) -> None:
        """Add what the forward pass of a batch that counts left; before the backward pass, which frees activations."""
        if not self.usable:
            return
        if self.grams is not None:
            masks = {name: stream.masks for stream in self._recorder.streams for name in stream.blocks}
            for (name, number, path), inputs in self._read.items():
                self.grams.add(f"{name}.{path}", inputs, masks[name][number])
        self._forget_running()
        self._recorder.end_batch()

    def skip_batch(self) -> None:
        """Drop what the forward pass of a batch that does not count left."""
        if not self.usable:
            return
        self._forget_running()
        self._recorder.skip_batch()
        complete = {name: stream.complete for stream in self._recorder.streams for name in stream.blocks}
        for name, calls in self.outputs.items():
            self._room += sum(call.bytes for call in calls[complete[name] :])
            del calls[complete[name] :]

    def finish(self) -> None:
        """Check what was recorded once all batches were run."""
        if not self.usable:
            return
        try:
            self._recorder.finish()
        except UnsupportedModelError:
            self.discard()

    def discard(self) -> None:
        """Free everything."""
        self.usable = False
        self.grams = None
        self.outputs = {}
        self._forget_running()
        self._recorder.streams.clear()

    @property
    def streams(self) -> list[_Stream]:
        """The stacks of layers with the inputs of the first layer of each, and all calls."""
        return self._recorder.streams

    def _forget_running(self) -> None:
        self._read.clear()
        self._running.clear()

    def _guarded(self, hook: Callable[..., None]) -> Callable[..., None]:
        @wraps(hook)
        def guarded(*args: Any) -> None:
            if not self.usable or not is_observed() or recomputing():
                return
            try:
                with torch.no_grad():
                    hook(*args)
            except UnsupportedModelError:
                self.discard()

        return guarded

    def _watch(self, stream: _Stream, name: str, stack: contextlib.ExitStack) -> None:
        """Follow the calls of one layer and of its consumers."""
        block = self._model.get_submodule(name)

        def start(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._running[name] = hidden_input(args, kwargs).shape[:-1], CallOutputs()

        def end(_: nn.Module, __: Any, output: Any) -> None:
            outputs = self._running.pop(name)[1]
            if name in self.outputs:
                outputs.output = _states(output, name).detach()
                self._keep(stream, name, outputs)

        def reader(path: str, routed: bool) -> Callable[..., None]:
            def hook(_: nn.Module, inputs: Tensor, output: Tensor) -> None:
                if name not in self._running:
                    raise UnsupportedModelError(f"{name}.{path} runs outside {name}.")
                positions, outputs = self._running[name]
                if self.grams is not None:
                    self._read[name, len(stream.calls[name]) - 1, path] = _at_positions(inputs.detach(), positions)
                if name in self.outputs and not routed:
                    # some layers add in place to what a projection gives
                    outputs.consumers[path] = _at_positions(output.detach(), positions).clone()

            return hook

        stack.callback(block.register_forward_pre_hook(self._guarded(start), with_kwargs=True).remove)
        stack.callback(block.register_forward_hook(self._guarded(end)).remove)
        for path, routed in self._consumers[name].items():
            handle = after_layer(block.get_submodule(path), self._guarded(reader(path, routed)))
            stack.callback(handle.remove)

    def _keep(self, stream: _Stream, name: str, outputs: CallOutputs) -> None:
        """Keep what a call gave, and drop the outputs of the last layers that have any if they do not fit any more."""
        self.outputs[name].append(outputs)
        self._room -= outputs.bytes
        while self._room < 0:
            kept = [block for block in stream.blocks if block in self.outputs]
            self._room += sum(call.bytes for call in self.outputs.pop(kept[-1]))
