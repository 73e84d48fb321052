"""Tensors that FSDP2 shards, gathered, cut and sharded again."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_prune.distributed import shards
from lit_prune.surgery.tensors import DimensionCut, cut_tensor, paste_tensor


class ShardedCut:
    """A sharded tensor, gathered and cut; of what is removed, this process keeps its share.

    Args:
        tensor: The tensor.
        cuts: What is removed.
    """

    def __init__(self, tensor: DTensor, cuts: Sequence[DimensionCut]) -> None:
        self._cuts, self._like = cuts, tensor
        self.whole, removed = cut_tensor(shards.full(tensor), cuts)
        self._removed = [shards.shard_like(part, tensor) for part in removed]
        self._kept: DTensor | None = None

    def let_go(self, keep: bool = False) -> None:
        """Free what was gathered; with ``keep``, keep this process's share of it for :meth:`pasted`."""
        if keep:
            self._kept = shards.shard_like(self.whole, self._like)
        del self.whole, self._like

    def pasted(self, kept: DTensor) -> Tensor:
        """The whole tensor from before the cut; ``kept`` is what stayed of it, unless that was kept here."""
        stayed = shards.full(kept if self._kept is None else self._kept)
        return paste_tensor(stayed, self._cuts, [shards.full(part) for part in self._removed])
