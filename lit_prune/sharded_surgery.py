"""Cutting parameters that FSDP2 shards, and sharded state: gathered, cut and sharded again one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_prune import sharding
from lit_prune.cuts import DimensionCut, cut_tensor, paste_tensor
from lit_prune.modeling_pruned import sync_features
from lit_prune.optimizer_groups import replace_in_groups

if TYPE_CHECKING:
    from lit_prune.optimizer_state import StateCutter


class ShardedCut:
    """A sharded tensor, gathered and cut; of what is removed, this process keeps its share.

    Args:
        tensor: The tensor.
        cuts: What is removed.
    """

    def __init__(self, tensor: DTensor, cuts: Sequence[DimensionCut]) -> None:
        self._cuts, self._like = cuts, tensor
        self.whole, removed = cut_tensor(sharding.full(tensor), cuts)
        self._removed = [sharding.shard_like(part, tensor) for part in removed]
        self._kept: DTensor | None = None

    def let_go(self, keep: bool = False) -> None:
        """Free what was gathered; with ``keep``, keep this process's share of it for :meth:`pasted`."""
        if keep:
            self._kept = sharding.shard_like(self.whole, self._like)
        del self.whole, self._like

    def pasted(self, kept: DTensor) -> Tensor:
        """The whole tensor from before the cut; ``kept`` is what stayed of it, unless that was kept here."""
        stayed = sharding.full(kept if self._kept is None else self._kept)
        return paste_tensor(stayed, self._cuts, [sharding.full(part) for part in self._removed])


def cut_sharded(
    model: nn.Module,
    old: DTensor,
    owners: Sequence[tuple[nn.Module, str]],
    cuts: Sequence[DimensionCut],
    values: Tensor | None,
    cutter: StateCutter,
    journal: list[Callable[[], None]],
) -> None:
    """Put a smaller sharded parameter in the place of one, in the model and in the optimizers; a collective.

    Args:
        model: The model.
        old: The parameter.
        owners: The modules that hold it, and the name that they hold it by.
        cuts: What is removed.
        values: New values, in the shape after the cut.
        cutter: Cuts the state of the optimizers.
        journal: Takes what undoes this.
    """
    shape, gradient = old.shape, old.grad
    kept = ShardedCut(old, cuts)
    whole = kept.whole if values is None else sharding.full(values).to(old.dtype)
    change = None if values is None else whole - kept.whole
    new = _put(model, old, owners, whole, cutter)
    kept.let_go(keep=values is not None)

    def undo() -> None:
        restored = _put(model, new, owners, kept.pasted(new), cutter)
        restored.grad = gradient

    journal.append(undo)
    cutter.cut(new, shape, cuts, change)


def _put(
    model: nn.Module, old: DTensor, owners: Sequence[tuple[nn.Module, str]], whole: Tensor, cutter: StateCutter
) -> DTensor:
    new: Any = sharding.replace(model, old, whole)
    for module, _ in owners:
        sync_features(module)
    replace_in_groups(cutter.optimizers, old, new)
    cutter.rename(old, new)
    return new
