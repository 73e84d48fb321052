"""Runs a decoder layer up to one consumer after the other, on all batches, without computing anything twice.

The consumers of a layer are refitted in the order of their calls, and each refit needs what the consumer reads once the ones
before it are refitted. Where a module within the layer (attention, a feed-forward network) gives just what a consumer in it
gives, the module does not have to run again to say what it gives once the consumer has other weights: what the consumer
reads is kept, and the module's output is made from that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from lit_prune.architectures.layers import after_layer, first_tensor
from lit_prune.calibration.module_checks import relative_difference, tolerance
from lit_prune.errors import UnsupportedModelError
from lit_prune.repair.calls import BlockCall
from lit_prune.repair.experts import StopForward
from lit_prune.repair.hidden_states import HiddenStates, Storage
from lit_prune.repair.replay import _at_positions, _replayed
from lit_prune.repair.streams import _states


class PartialRuns:
    """The runs of one layer on all batches.

    Args:
        block: A copy of the layer that is nobody else's; its consumers may change between the runs.
        name: Its path in the model, for messages.
        consumers: Paths within it of the consumers, in the order of their calls.
        inputs: Hidden states of every call.
        calls: What else it is called with.
        storage: Where what consumers read is held.
        limit: Bytes that may be kept of what consumers read.
    """

    def __init__(
        self,
        block: nn.Module,
        name: str,
        consumers: Sequence[str],
        inputs: HiddenStates,
        calls: Sequence[BlockCall],
        storage: Storage,
        limit: int,
    ) -> None:
        self._block = block
        self._name = name
        self._consumers = consumers
        self._inputs = inputs
        self._calls = calls
        self._room = limit
        self._storage = storage
        # by call and consumer, what it read
        self._kept: list[dict[str, Tensor]] = [{} for _ in calls]
        # by consumer, the module that gives what it gives, and of how many parts
        self._modules: dict[str, tuple[str, int]] = {}
        if limit and calls and consumers:
            self._modules = self._replaceable()

    def until(self, number: int, consumer: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Run the layer up to a consumer.

        Args:
            number: Number of the call.
            consumer: Path of the consumer.

        Returns:
            What it and those before it read and give, by path, with the dimensions of the positions where they are of all.
        """
        hidden = self._inputs[number]
        found = self._run(number, hidden, consumer)[1]
        read = found[consumer][0]
        if consumer in self._modules and consumer not in self._kept[number] and read.nbytes <= self._room:
            self._room -= read.nbytes
            self._kept[number][consumer] = self._storage.put(read)
        positions = hidden.shape[:-1]
        return {path: (_at_positions(x, positions), _at_positions(y, positions)) for path, (x, y) in found.items()}

    def output(self, number: int) -> Tensor:
        """Run the layer to its end, and forget what was kept of that call.

        Args:
            number: Number of the call.
        """
        output, _ = self._run(number, self._inputs[number], None)
        self._kept[number] = {}
        assert output is not None
        return output

    def forget(self) -> None:
        """Keep nothing of what consumers read, once something before them may have changed."""
        for kept in self._kept:
            kept.clear()

    def _run(
        self, number: int, hidden: Tensor, until: str | None
    ) -> tuple[Tensor | None, dict[str, tuple[Tensor, Tensor]]]:
        found: dict[str, tuple[Tensor, Tensor]] = {}
        with contextlib.ExitStack() as stack:
            for path in self._consumers:
                projection = self._block.get_submodule(path)
                if path in self._kept[number]:
                    with self._calls[number].precision.entered():
                        read = self._kept[number][path].to(hidden.device, non_blocking=True)
                        given = projection(read)
                    # some layers add in place to what a projection gives
                    found[path] = read, given.clone()
                    stack.enter_context(_gives(self._block, *self._modules[path], given))
                elif until is not None:
                    stack.callback(after_layer(projection, _noting(found, path, until)).remove)
                if path == until and path in found:
                    return None, found
            try:
                with _replayed(self._name):
                    return _states(self._calls[number].run(self._block, hidden), self._name), found
            except StopForward:
                return None, found

    def _replaceable(self) -> dict[str, tuple[str, int]]:
        """Find, by running the first call, the module around each consumer that gives what the consumer gives.

        Returns:
            By consumer, the path of the outermost such module, and of how many parts the tuple is that it gives; 0 if it gives
            a tensor. Only where the layer gives the same if the modules do not run.
        """
        around = {c: [c.rsplit(".", n)[0] for n in range(c.count("."), 0, -1)] for c in self._consumers}
        if not any(around.values()):
            return {}
        outputs: dict[str, list[Any]] = {}
        reads: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack:
            for path in {*self._consumers, *(p for paths in around.values() for p in paths)}:
                module = self._block.get_submodule(path)
                stack.callback(module.register_forward_hook(_noting_all(outputs, reads, path), with_kwargs=True).remove)
            hidden = self._inputs[0]
            whole = self._run(0, hidden, None)[0]
        found: dict[str, tuple[str, int]] = {}
        for consumer, paths in around.items():
            for path in paths:
                others = [c for c in self._consumers if c != consumer and c.startswith(f"{path}.")]
                size = _parts(outputs.get(path, []), outputs.get(consumer, []))
                if size is not None and not others:
                    found[consumer] = path, size
                    break
        self._modules = found
        self._kept[0] = {consumer: reads[consumer] for consumer in found}
        try:
            again = self._run(0, hidden, None)[0]
        except UnsupportedModelError:
            again = None
        self._kept[0] = {}
        same = whole is not None and again is not None and relative_difference(again, whole) <= tolerance(whole.dtype)
        first = self._consumers[0]
        if same and first in found and reads[first].nbytes <= self._room:
            # what is before the first consumer stays as it is
            self._room -= reads[first].nbytes
            self._kept[0][first] = self._storage.put(reads[first])
        return found if same else {}


def _noting(found: dict[str, tuple[Tensor, Tensor]], path: str, until: str) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: Tensor, output: Tensor) -> None:
        found[path] = inputs, output.clone()
        if path == until:
            raise StopForward

    return hook


def _noting_all(outputs: dict[str, list[Any]], reads: dict[str, Tensor], path: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        outputs.setdefault(path, []).append(output)
        if (inputs := first_tensor(module, args, kwargs)) is not None:
            reads[path] = inputs

    return hook


def _parts(outer: Sequence[Any], inner: Sequence[Any]) -> int | None:
    """Of how many parts the tuple is that a module gives and that begins with what a consumer gives; 0 for the tensor itself.

    Args:
        outer: What the module gave, call by call.
        inner: What the consumer gave.

    Returns:
        ``None`` if the module gives something else, or one of them was not called just once.
    """
    if len(outer) != 1 or len(inner) != 1:
        return None
    first = outer[0][0] if isinstance(outer[0], tuple) and outer[0] else outer[0]
    if not isinstance(first, Tensor) or not isinstance(inner[0], Tensor):
        return None
    same = first is inner[0] or (
        first.data_ptr() == inner[0].data_ptr()
        and first.shape == inner[0].shape
        and first.stride() == inner[0].stride()
    )
    if not same:
        return None
    return len(outer[0]) if isinstance(outer[0], tuple) else 0


@contextlib.contextmanager
def _gives(block: nn.Module, path: str, parts: int, tensor: Tensor) -> Iterator[None]:
    """Let a module give a tensor, or a tuple of so many parts that begins with it, in place of running."""
    module = block.get_submodule(path)
    result = (tensor, *[None] * (parts - 1)) if parts else tensor
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *_, **__: result
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before
