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
from lit_prune.distributed import shards
from lit_prune.distributed.sharing import Turns
from lit_prune.groups import BLOCK, GroupSet
from lit_prune.repair.channel_redundancy import unexplained_anywhere
from lit_prune.repair.consumer_grams import ConsumerGrams, observable_consumers
from lit_prune.repair.hidden_states import HiddenStates
from lit_prune.repair.recording import Recording
from lit_prune.repair.regression import SHARE_DAMPING, _relative, unexplained_share
from lit_prune.repair.replay import _trace, is_chain
from lit_prune.repair.streams import _record, _Stream


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
    recording: Recording | None = None,
    offload: bool | None = None,
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
        recording: What calibration recorded of the same model on the same batches; they are not run again then.
        offload: Whether hidden states are held in CPU memory where the model is on another device; ``None`` lets it depend on
            their size.

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
    consumers = observable_consumers(scored)
    if not consumers:
        return {}
    turns = Turns()
    with evaluation_mode(model if root is None else root):
        streams = _record(model, scored, batches, forward, offload) if recording is None else recording.streams
        for stream in streams:
            shards.reshard(model)
            states = stream.inputs.copy()
            for name in progress(stream.blocks):
                if recording is not None and recording.grams is not None:
                    block, grams = model.get_submodule(name), recording.grams
                else:
                    block = shards.plain_copy(model.get_submodule(name))
                    grams = _walk(block, list(consumers.get(name, ())), states, stream, name)
                for path, uses in consumers.get(name, {}).items():
                    weight = block.get_parameter(f"{path.removeprefix(f'{name}.')}.weight")
                    gram, tokens = grams.take(path, weight, uses[0][1].dim, all_reduce)
                    relative = _relative(SHARE_DAMPING, gram, tokens)
                    for group_set, part in uses:
                        share = partial(unexplained_share, gram, weight.movedim(part.dim, -1), part.index, relative)
                        turns.add((group_set.key, part.module), len(part.index), share)
                        del share
                    del gram
    return _largest(turns.results())


def _largest(shares: Mapping[Any, Tensor]) -> dict[tuple[str, str], Tensor]:
    """Of several consumers of a set, the share in the one where the others can make up for least."""
    largest: dict[tuple[str, str], Tensor] = {}
    for (key, _), share in shares.items():
        largest[key] = torch.maximum(largest.get(key, share), share)
    return largest


def _walk(block: nn.Module, paths: Sequence[str], states: HiddenStates, stream: _Stream, name: str) -> ConsumerGrams:
    """Run one layer on all its inputs, which its outputs take the place of; give the Gram matrices of its consumers."""
    grams = ConsumerGrams()
    within = [path.removeprefix(f"{name}.") for path in paths]
    for number, (call, mask) in enumerate(zip(stream.calls[name], stream.masks, strict=True)):
        output, traced = _trace(block, within, states[number], call, name)
        assert output is not None
        if number == 0:
            stream.check_replay(name, output)
        for path, (inputs, _) in traced.items():
            grams.add(f"{name}.{path}", inputs, mask)
        states[number] = output
    return grams
