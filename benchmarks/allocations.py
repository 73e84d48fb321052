"""Bytes of the tensors that are alive while something runs, on any device: also where nothing is in memory (``meta``, fake tensors)."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class Allocations(TorchDispatchMode):
    """Counts the memory of tensors that operations make, and their peak.

    What an operation needs only within itself (a copy for a library, a workspace) is not seen. Where no value is
    known, one number is read as 1.0 or 0, conditions hold but for those of ``any``, what is copied to the CPU is zeros or true, and any two
    tensors are equal.

    Args:
        at_least: Bytes of a storage that is counted, at least.

    Attributes:
        bytes: Bytes alive.
        number: How many storages that are.
        peak: The most bytes so far.
        peak_number: The most storages so far.
    """

    def __init__(self, at_least: int = 0) -> None:
        super().__init__()
        self.bytes = self.number = self.peak = self.peak_number = 0
        self._at_least = at_least
        # whether any of some values holds, where no value is known
        self._anys = WeakIdKeyDictionary()
        # by address of a storage its bytes, None if it is not counted
        self._known: dict[int, int | None] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor) and _has_no_values(args[0]):
            if function is torch.ops.aten._local_scalar_dense.default:
                return self._number_in(args[0])
            if function is torch.ops.aten.equal.default:
                return True
            if function is torch.ops.aten._to_copy.default and (device := (kwargs or {}).get("device")) is not None:
                if torch.device(device).type == "cpu":
                    with unset_fake_temporarily():
                        zeros = torch.zeros(args[0].shape, dtype=(kwargs or {}).get("dtype") or args[0].dtype)
                    return zeros if args[0].dtype != torch.bool else ~zeros.bool()
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self._known:
                self._known[key] = None
                weakref.finalize(tensor.untyped_storage(), self._free, key)
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.any.default:
            self._anys[result] = True
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self.add(tensor)
        return result

    def _number_in(self, tensor: Tensor) -> bool | float | int:
        if tensor.dtype == torch.bool:
            return tensor not in self._anys
        return 1.0 if tensor.is_floating_point() else 0

    def add(self, tensor: Tensor) -> None:
        """Count a tensor that was there before."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if self._known.get(key) is not None or size < max(1, self._at_least):
            return
        if key not in self._known:
            weakref.finalize(storage, self._free, key)
        self._known[key] = size
        self.bytes += size
        self.number += 1
        self.peak, self.peak_number = max(self.peak, self.bytes), max(self.peak_number, self.number)

    def restart(self) -> None:
        """Begin the peak anew."""
        self.peak, self.peak_number = self.bytes, self.number

    def _free(self, key: int) -> None:
        size = self._known.pop(key, None)
        if size is not None:
            self.bytes -= size
            self.number -= 1


def _has_no_values(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"
