"""Masks in place of a cut, to compare plans by the loss of the masked model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.architectures.layers import passed_over
from lit_prune.architectures.norms import norms_over_kept, stream_norms
from lit_prune.calibration.evaluation import evaluation_mode
from lit_prune.distributed import shards
from lit_prune.errors import (
    CalibrationError,
    UnsupportedStrategyError,
)
from lit_prune.groups import HIDDEN, GroupSet
from lit_prune.plan import PruningPlan


@contextlib.contextmanager
def masked(model: nn.Module, group_sets: Sequence[GroupSet], plan: PruningPlan) -> Iterator[None]:
    """Let the model compute what it would after the cut: its consumers do not read what is to leave. Undone at the end."""
    by_key = {s.key: s for s in group_sets}
    before: list[tuple[Tensor, int, Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for entry in plan.group_entries:
                group_set = by_key[entry.key]
                removed = group_set.kept_to_removed(entry.kept)
                for part in group_set.masked:
                    weight: Tensor = model.get_parameter(part.parameter)
                    if shards.is_sharded(weight) and shards.sharded_dim(weight) == part.dim:
                        raise UnsupportedStrategyError(
                            f"{part.parameter!r} is sharded along dimension {part.dim}, along which its groups lie, so plans"
                            f" cannot be compared by masks. Name one criterion in place of importance='auto'."
                        )
                    weight = shards.local(weight)
                    columns = part.index[removed].flatten().to(weight.device)
                    before.append((weight, part.dim, columns, weight.index_select(part.dim, columns)))
                    weight.index_fill_(part.dim, columns, 0.0)
        torch.clear_autocast_cache()
        with passed_over(model, plan.removed_blocks), _narrow_norms(model, plan):
            yield
    finally:
        with torch.no_grad():
            # the last first: where two sets mask one parameter along both dimensions, later values are of what is masked
            for tensor, dim, columns, values in reversed(before):
                tensor.index_copy_(dim, columns, values)
        torch.clear_autocast_cache()


def _narrow_norms(model: nn.Module, plan: PruningPlan) -> contextlib.AbstractContextManager[None]:
    """Norms over the hidden channels count those that stay, as they will."""
    for entry in plan.group_entries:
        if entry.kind == HIDDEN:
            return norms_over_kept(model, stream_norms(model), torch.tensor(entry.kept))
    return contextlib.nullcontext()


@torch.no_grad()
def masked_loss(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    plan: PruningPlan,
    batches: Iterable[Any],
    loss_fn: Callable[[Any], Tensor | None],
    held_back: Callable[[int], bool],
    *,
    root: nn.Module | None = None,
) -> float:
    """Mean loss of the model, cut as planned, over the calibration batches that were held back (all, if none were).

    Args:
        model: The model; masked meanwhile.
        group_sets: Its group sets.
        plan: The plan.
        batches: The calibration batches.
        loss_fn: Runs one batch through the model and returns its loss.
        held_back: Tells by its number whether a batch was held back.
        root: The module that holds the model, if ``loss_fn`` runs more than the model.

    Raises:
        CalibrationError: If there is no batch.
    """
    losses: list[Tensor] = []
    shards.reshard(model)
    with evaluation_mode(model if root is None else root), masked(model, group_sets, plan):
        held = False
        # one after the other, as a batch may come with state of the module that is of this batch only
        for number, batch in enumerate(batches):
            if held_back(number) and not held:
                held, losses = True, []
            if held and not held_back(number):
                continue
            loss = loss_fn(batch)
            if isinstance(loss, Tensor):
                losses.append(loss.float())
    if not losses:
        raise CalibrationError("No calibration batch gave a loss to choose a plan by.")
    return float(torch.stack(losses).mean())
