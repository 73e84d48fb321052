"""What the processes of a distributed run have to agree on while they calibrate on batches of their own."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes of a run, each with calibration batches of its own; every method is a collective.

    Args:
        device: Where the process group's tensors have to be.
        mean_gradients: Whether gradients are local, and have to be averaged over the processes. Not so under FSDP2,
            which does it itself.
    """

    def __init__(self, device: torch.device, *, mean_gradients: bool = True) -> None:
        self.device = device
        self.mean_gradients = mean_gradients
        self.size = dist.get_world_size()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor, the same on all of them, on the device and in the dtype given."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of every process's tensor."""
        # summed and divided: gloo has no average
        return self.sum(tensor) / self.size

    def all(self, flag: bool) -> bool:
        """Whether the flag is set on every process."""
        return bool(self.minimum(torch.tensor(int(flag))))

    def minimum(self, tensor: Tensor) -> Tensor:
        """The elementwise minimum over the processes."""
        return self._reduced(tensor, dist.ReduceOp.MIN)

    def _reduced(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        result = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(result, op=operation)
        return result.to(tensor.device)
