"""Sums of tensors, on their device or offloaded to CPU memory."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from lit_prune.torch_internals import base_of


class _Accumulator:
    """Sums tensors by key, in a dtype, where they are or in CPU memory.

    What comes from a CUDA device is copied into pinned memory by a stream of its own and added by the CPU a few tensors
    later, so that neither waits for the other.

    Args:
        dtype: The dtype of the sums.
        offload: Whether to keep them in CPU memory.
        depth: How many copies may be under way.
    """

    def __init__(self, dtype: torch.dtype, offload: bool, depth: int = 2) -> None:
        self.sums: dict[Any, Tensor] = {}
        self._dtype = dtype
        self._offload = offload
        self._depth = depth
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._copies: deque[tuple[Any, Tensor, torch.cuda.Event]] = deque()

    def add(self, key: Any, value: Tensor) -> None:
        """Add a tensor, which nothing may change afterwards."""
        if self._offload and value.is_cuda:
            self._copies.append((key, *self._copy(value)))
            if len(self._copies) > self._depth:
                self._add_copy()
        else:
            self._add(key, value.cpu() if self._offload else value)

    def _add(self, key: Any, value: Tensor) -> None:
        if key in self.sums:
            self.sums[key] += value
        elif value.dtype == self._dtype and base_of(value) is None and value.is_contiguous():
            self.sums[key] = value
        else:
            self.sums[key] = value.to(self._dtype, copy=True)

    def _copy(self, value: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        if value.device not in self._streams:
            self._streams[value.device] = torch.cuda.Stream(value.device)
        stream = self._streams[value.device]
        stream.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(stream):
            pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            pinned.copy_(value, non_blocking=True)
            event = stream.record_event()
        # its memory may be given out again only when the copy is done
        value.record_stream(stream)
        return pinned, event

    def _add_copy(self) -> None:
        key, pinned, event = self._copies.popleft()
        event.synchronize()
        if key in self.sums:
            self.sums[key] += pinned
        else:
            # not the buffer itself: pinned memory is scarce, and goes back to be filled again
            self.sums[key] = torch.empty(pinned.shape, dtype=self._dtype).copy_(pinned)

    def finish(self) -> dict[Any, Tensor]:
        """The sums, once all copies have come in."""
        while self._copies:
            self._add_copy()
        return self.sums
