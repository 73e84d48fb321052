"""Fraction of each group's output that a linear regression on the other groups cannot reconstruct."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune._renamed import renamed_arguments
from lit_prune.calibration.evaluation import evaluation_mode
from lit_prune.calibration.gram import Gram, real_rows
from lit_prune.calibration.precision import accumulation_dtype
from lit_prune.distributed import shards
from lit_prune.distributed.sharing import Turns
from lit_prune.groups import BLOCK, GroupSet
from lit_prune.repair.channel_redundancy import unexplained_anywhere
from lit_prune.repair.regression import SHARE_DAMPING, _relative, unexplained_share
from lit_prune.repair.replay import (
    _record,
    _trace,
    is_chain,
)


@torch.no_grad()
@renamed_arguments(total="all_reduce")
def unexplained_shares(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    *,
    root: nn.Module | None = None,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
) -> dict[tuple[str, str], Tensor]:
    """Fraction of each group's output that a linear regression on the other groups cannot reconstruct.

    It walks through the blocks one by one, as :func:`least_squares` does, and holds the Gram matrices of one block at a time.
    Where the model is no chain of blocks, see :func:`lit_prune.repair.channel_redundancy.unexplained_anywhere`.

    Args:
        model: The model; it is not changed.
        group_sets: Its group sets.
        batches: Calibration batches.
        forward: Runs one batch through the model.
        root: The module that holds the model, if ``forward`` runs more than the model.
        progress: Wraps the sequence of block names.
        all_reduce: Sums a tensor over the processes that calibrate on batches of their own, if there are several.

    Returns:
        By key of the group set, shares in (0, 1], tensors of shape ``(groups,)``; whole blocks have none. Empty if the
        consumers of other sets cannot be observed.

    Raises:
        UnsupportedModelError: If the blocks cannot be run on their own, one after the other.
    """
    scored = [s for s in group_sets if s.kind != BLOCK]
    if not is_chain(model, scored):
        return unexplained_anywhere(
            model, scored, lambda: contextlib.nullcontext((batches, forward)), root=root, all_reduce=all_reduce
        )
    if not all(s.block and s.consumers and len(s.repairable) == len(s.consumers) for s in scored):
        return {}
    turns = Turns()
    with evaluation_mode(model if root is None else root):
        for stream in _record(model, scored, batches, forward):
            shards.reshard(model)
            states = stream.inputs
            for name in progress(stream.blocks):
                block = shards.plain_copy(model.get_submodule(name))
                parts = {
                    p.module.removeprefix(f"{name}."): (s, p) for s in scored if s.block == name for p in s.repairable
                }
                grams: dict[str, Gram] = {}
                tokens: dict[str, Tensor] = {}
                following = []
                for x, call, mask in zip(states, stream.calls[name], stream.masks, strict=True):
                    output, traced = _trace(block, list(parts), x, call, name)
                    assert output is not None
                    following.append(output)
                    if len(following) == 1:
                        stream.check_replay(name, output)
                    for path, (inputs, _) in traced.items():
                        a, count = real_rows(inputs, mask)
                        if path not in grams:
                            grams[path] = Gram(a.shape[1], a.device, accumulation_dtype(a.dtype))
                        grams[path].add(a)
                        tokens[path] = tokens.get(path, torch.zeros((), dtype=torch.float64, device=a.device)) + count
                for path, (group_set, part) in parts.items():
                    if all_reduce is not None:
                        grams[path].replace(all_reduce)
                        tokens[path] = all_reduce(tokens[path])
                    gram, weight = grams.pop(path).matrix, block.get_parameter(f"{path}.weight").movedim(part.dim, -1)
                    relative = _relative(SHARE_DAMPING, gram, tokens[path])
                    share = partial(unexplained_share, gram, weight, part.index, relative)
                    turns.add((group_set.key, part.module), len(part.index), share)
                    del gram, share
                states = following
    return _largest(turns.results())


def _largest(shares: Mapping[Any, Tensor]) -> dict[tuple[str, str], Tensor]:
    """Of several consumers of a set, the share in the one where the others can make up for least."""
    largest: dict[tuple[str, str], Tensor] = {}
    for (key, _), share in shares.items():
        largest[key] = torch.maximum(largest.get(key, share), share)
    return largest
