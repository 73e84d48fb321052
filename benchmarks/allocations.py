"""Bytes of the tensors that are alive while something runs, also on the meta device, where nothing is in memory."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class Allocations(TorchDispatchMode):
    """Counts the memory of tensors that operations make, and its peak.

    What an operation needs only within itself (a copy for a library, a workspace) is not seen, nor is what was there before.
    On the meta device, where no value is known, one number is read as 1.0 or 0; conditions hold, but for those of ``any``;
    what is copied from there is zeros or true; and any two tensors are equal.

    Args:
        at_least: Bytes of a storage that is counted, at least.

    Attributes:
        bytes: Bytes alive.
        number: How many storages that are.
        peak: The most bytes so far.
        peak_number: The most storages so far.
    """

    def __init__(self, at_least: int = 1) -> None:
        super().__init__()
        self.bytes = self.number = self.peak = self.peak_number = 0
        self._at_least = at_least
        # by address of a storage its bytes, 0 if it is not counted
        self._known: dict[int, int] = {}
        self._anys = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if function is torch.ops.aten._local_scalar_dense.default:
                return self._number_in(args[0])
            if function is torch.ops.aten.equal.default:
                return True
            if (
                function is torch.ops.aten._to_copy.default
                and kwargs.get("device", torch.device("meta")).type != "meta"
            ):
                zeros = torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
                return zeros if args[0].dtype != torch.bool else ~zeros.bool()
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._note(tensor, counts=False)
        result = function(*args, **kwargs)
        if function is torch.ops.aten.any.default:
            self._anys[result] = True
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor, counts=True)
        return result

    def _number_in(self, tensor: Tensor) -> bool | float | int:
        if tensor.dtype == torch.bool:
            return tensor not in self._anys
        return 1.0 if tensor.is_floating_point() else 0

    def _note(self, tensor: Tensor, *, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = size if counts and size >= self._at_least else 0
        weakref.finalize(storage, self._free, key)
        if self._known[key]:
            self.bytes += size
            self.number += 1
            self.peak, self.peak_number = max(self.peak, self.bytes), max(self.peak_number, self.number)

    def _free(self, key: int) -> None:
        if size := self._known.pop(key):
            self.bytes -= size
            self.number -= 1
