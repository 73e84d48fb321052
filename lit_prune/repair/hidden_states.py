"""Hidden states of all calibration tokens, on their device or, where they take too much of it, in CPU memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# lists of hidden states that a repair holds at its worst moment: what a layer reads in the dense and in the pruned model,
# what it gives in the dense model, and what attention and the feed-forward network give there
COPIES = 5
# the part of a device's memory that they may take before they are held in CPU memory
_SHARE = 8


class Storage:
    """Where hidden states are held: on their device until they are too many for it, in pinned CPU memory from then on.

    On a CPU nothing is moved.

    Args:
        offload: Whether they are held in CPU memory from the beginning; ``None`` lets it depend on their size.
    """

    def __init__(self, offload: bool | None = None) -> None:
        self._offload = offload
        self._bytes = 0

    @property
    def offloads(self) -> bool:
        """Whether hidden states are held in CPU memory."""
        return bool(self._offload)

    def count(self, tensor: Tensor) -> None:
        """Take note of hidden states of another call, of which there will be :data:`COPIES` lists."""
        self._bytes += tensor.nbytes
        if self._offload is None and tensor.is_cuda:
            total = torch.cuda.get_device_properties(tensor.device).total_memory
            if exceeds(self._bytes, total):
                self._offload = True

    def put(self, tensor: Tensor) -> Tensor:
        """Return a tensor as it is to be held."""
        if not self._offload or not tensor.is_cuda:
            return tensor
        held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        # in the order of the device's stream, as is the way back
        return held.copy_(tensor, non_blocking=True)


def exceeds(held: int, memory: int) -> bool:
    """Whether hidden states are too many for a device.

    Args:
        held: Bytes of what one layer reads.
        memory: Bytes of the device's memory.
    """
    return COPIES * held > memory // _SHARE


class HiddenStates:
    """Hidden states by call: what is read comes on the device that it was put in on.

    Args:
        storage: Where they are held.
        states: The first ones.
    """

    def __init__(self, storage: Storage, states: Iterable[Tensor] = ()) -> None:
        self._storage = storage
        self._device = torch.device("cpu")
        self._held: list[Tensor] = []
        for tensor in states:
            self.append(tensor)

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, number: int) -> Tensor:
        return self._held[number].to(self._device, non_blocking=True)

    def __setitem__(self, number: int, states: Tensor) -> None:
        self._device = states.device
        self._held[number] = self._storage.put(states)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[number] for number in range(len(self)))

    def append(self, states: Tensor) -> None:
        """Add the hidden states of one more call."""
        self._device = states.device
        self._held.append(self._storage.put(states))

    def truncate(self, count: int) -> None:
        """Drop all but the first ones."""
        del self._held[count:]

    def settle(self) -> None:
        """Move what was put in before the storage began to hold hidden states in CPU memory."""
        self._held = [self._storage.put(states) for states in self._held]

    def copy(self) -> HiddenStates:
        """Return another list of the same hidden states."""
        other = HiddenStates(self._storage)
        other._device, other._held = self._device, list(self._held)
        return other
