"""Cutting parameters that FSDP2 shards, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_prune.architectures.module_sizes import sync_sizes
from lit_prune.distributed import shards
from lit_prune.surgery.optimizer_groups import replace_in_groups
from lit_prune.surgery.optimizer_state import StateCutter
from lit_prune.surgery.sharded_tensors import ShardedCut
from lit_prune.surgery.tensors import DimensionCut


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
    whole = kept.whole if values is None else shards.full(values).to(old.dtype)
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
    new: Any = shards.replace(model, old, whole)
    for module, _ in owners:
        sync_sizes(module)
    replace_in_groups(cutter.optimizers, old, new)
    cutter.rename(old, new)
    return new
