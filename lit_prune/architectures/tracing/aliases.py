"""Writing in place: every tensor that shows the same memory shows the labels of what was written."""

from __future__ import annotations

import weakref
from typing import Protocol

import torch
from torch import Tensor

from lit_prune.architectures.tracing.fields import Rules, Value, compress, varies


class Known(Protocol):
    """Where values of tensors are kept."""

    def value(self, tensor: Tensor) -> Value:
        """What is known of a tensor."""

    def set_value(self, tensor: Tensor, value: Value) -> None:
        """Replace what is known of a tensor."""


class Aliases:
    """The tensors of a run by the memory that they show.

    Args:
        rules: How labels are collapsed where nothing better is known.
    """

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._tensors: dict[int, list[weakref.ref[Tensor]]] = {}

    def add(self, tensor: Tensor) -> None:
        """Remember a tensor."""
        if tensor.layout != torch.strided or not tensor.numel():
            return
        shown = self._tensors.setdefault(tensor.untyped_storage().data_ptr(), [])
        shown[:] = [ref for ref in shown if ref() is not None]
        if not any(ref() is tensor for ref in shown):
            shown.append(weakref.ref(tensor))

    def write(self, tensor: Tensor, value: Value, known: Known) -> None:
        """Let all other tensors that show the memory of ``tensor`` know that it holds ``value`` now."""
        if tensor.layout != torch.strided or not tensor.numel():
            return
        before = known.value(tensor)
        same_origin = (before.constant, before.weight) == (value.constant, value.weight)
        if (
            same_origin
            and [f.shape for f in before.fields] == [f.shape for f in value.fields]
            and all(torch.equal(a, b) for a, b in zip(before.fields, value.fields, strict=True))
        ):
            return
        for ref in self._tensors.get(tensor.untyped_storage().data_ptr(), ()):
            other = ref()
            if other is not None and other is not tensor and other.numel():
                known.set_value(other, self._overwritten(other, known.value(other), tensor, value))

    def _overwritten(self, other: Tensor, old: Value, tensor: Tensor, new: Value) -> Value:
        shape = tuple(other.shape)
        if len(old.fields) > 1 or len(new.fields) > 1:
            self._rules.rigid(old)
            self._rules.rigid(new)
            return Value(shape)
        size = tensor.untyped_storage().nbytes() // tensor.element_size()

        def show(memory: Tensor, view: Tensor) -> Tensor:
            return memory.as_strided(view.shape, view.stride(), view.storage_offset())

        memory = torch.full((size,), -1)
        if old.fields:
            show(memory, other).copy_(old.fields[0].expand(shape))
        written = torch.zeros(size, dtype=torch.bool)
        show(written, tensor).fill_(True)
        show(memory, tensor).copy_(new.fields[0].expand(tensor.shape) if new.fields else torch.tensor(-1))
        labels = show(memory, other).clone()
        blank = labels < 0
        if blank.any():
            if (labels >= 0).sum() == 0:
                return Value(shape, constant=old.constant and new.constant)
            fresh = self._blank(labels)
            labels = torch.where(blank, fresh.expand(shape), labels)
            fixed = blank & show(written, other) if old.constant else blank
            self._rules.freeze(labels[fixed])
        labels = compress(labels)
        if len(varies(labels)) > 1:
            # positions that were united meanwhile (padding, and what was written beside it) vary no more
            classes = torch.from_numpy(self._rules.labels.classes())
            labels = compress(classes[labels])
        return Value(shape, [labels] if varies(labels) else [], weight=old.weight and new.weight)

    def _blank(self, labels: Tensor) -> Tensor:
        """New labels for what nothing was written to yet, which vary as those do that were written."""
        dims = [d for d in range(labels.dim()) if self._varies(labels, d)]
        shape = [s if d in dims else 1 for d, s in enumerate(labels.shape)]
        count = 1
        for length in shape:
            count *= length
        return self._rules.labels.new(count).view(shape)

    @staticmethod
    def _varies(labels: Tensor, dim: int) -> bool:
        low = torch.where(labels < 0, labels.max(), labels).amin(dim)
        high = labels.amax(dim)
        # lines that nothing was written to do not vary
        return bool(((high != low) & (high >= 0)).any())
