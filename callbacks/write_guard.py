"""Undoing what a training step writes into weights, without a copy of those that it leaves alone."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lit_prune.distributed import shards
from lit_prune.torch_internals import DispatchMode, set_version, version_of, written_arguments

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class WriteGuard(DispatchMode):
    """Copies a tensor the moment before something within :meth:`watching` writes into it, and puts it back later.

    What PyTorch's dispatcher does not see (NumPy views, pointers) is found by a checksum, but cannot be put back.

    Args:
        tensors: The tensors to guard, by name. If some are sharded, changes are only found, and not put back.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()
        self._named = [(name, tensor) for name, tensor in tensors if not tensor.is_meta]
        self._checksums = [checksum(tensor) for _, tensor in self._named]
        self._guarded: dict[int, list[Tensor]] = {}
        if shards.any_sharded(tensor for _, tensor in self._named) is None:
            for _, tensor in self._named:
                self._guarded.setdefault(_storage(tensor), []).append(tensor)
        # by the tensor's identity: the values before the batch, and by mark those at the mark, with their versions
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._marks: list[dict[int, tuple[Tensor, Tensor, int]]] = []

    def watching(self) -> contextlib.AbstractContextManager[object]:
        """A context in which writes are seen."""
        return self if self._guarded else contextlib.nullcontext()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, after a copy of what it writes into."""
        del types
        kwargs = kwargs or {}
        for take in _written(func):
            written = take(args, kwargs)
            for tensor in written if isinstance(written, (list, tuple)) else (written,):
                if isinstance(tensor, Tensor):
                    self._keep(tensor)
        return func(*args, **kwargs)

    def _keep(self, written: Tensor) -> None:
        for tensor in self._guarded.get(_storage(written), ()):
            key = id(tensor)
            new = [mark for mark in self._marks if key not in mark]
            if key not in self._before or new:
                content = tensor.detach().clone()
                self._before.setdefault(key, (tensor, content))
                for mark in new:
                    mark[key] = (tensor, content, version_of(tensor))

    def mark(self) -> int:
        """Note that a graph is complete, whose backward pass still has to find the tensors as they are.

        Returns:
            The number of the mark, counted from the last :meth:`restore`.
        """
        self._marks.append({})
        return len(self._marks) - 1

    def rewind(self, mark: int | None) -> None:
        """Put back what was written since a mark, in such a way that autograd takes it for untouched."""
        for tensor, content, version in self._marks[mark].values() if mark is not None else ():
            tensor.data.copy_(content)
            set_version(tensor, version)

    def restore(self) -> None:
        """Put back everything that was written since the last call."""
        self._marks.clear()
        for tensor, content in self._before.values():
            tensor.data.copy_(content)
        self._before.clear()

    def changed(self) -> list[str]:
        """Names of the tensors that are not what they were, in spite of :meth:`restore`."""
        pairs = zip(self._named, self._checksums, strict=True)
        now = [(name, checksum(tensor), before) for (name, tensor), before in pairs]
        return [name for name, after, before in now if not torch.equal(after, before)]


def checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits as integers, on its device: a scalar that does not depend on rounding."""
    values = shards.local(tensor).detach()
    if values.is_complex():
        values = torch.view_as_real(values)
    kind = _INTEGERS.get(values.element_size())
    if kind is None or values.layout != torch.strided or values.is_quantized:
        return torch.zeros((), dtype=torch.int64)
    return values.view(kind).sum(dtype=torch.int64)


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        # sparse and functional tensors have none
        return -1


@functools.cache
def _written(func: Any) -> list[Callable[[Any, Any], Any]]:
    """Functions of an operation's arguments, each of which gives a tensor, or a list of them, that it writes into."""
    return [functools.partial(_argument, position, name) for position, name in written_arguments(func)]


def _argument(position: int, name: str, args: Any, kwargs: Any) -> Any:
    return args[position] if position < len(args) else kwargs.get(name)
