r"""Rotation of the hidden states to their principal directions, which changes no output, so that trailing ones can leave.

Between root-mean-square norms without scales, hidden states may be turned by one orthogonal matrix Q for the whole model:
what writes them gives :math:`Q^Tx`, what reads them multiplies with Q again, and the norm of a vector stays (Ashkboos et al.,
SliceGPT, ICLR 2024, who turn every layer in a way of its own and so need matrices between them). The scales of the norms are
folded into the layers that read them first. Q has the eigenvectors of the second moments of what all norms read, each token
divided by its root mean square, the largest first.

What optimizers remember is carried over, see :func:`rotate_hidden`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.architectures.layers import before_layer
from lit_prune.architectures.norms import scale_offset, stream_norms, subtracts_mean
from lit_prune.architectures.registry import find_group_sets, find_model
from lit_prune.calibration.evaluation import evaluation_mode, is_observed
from lit_prune.calibration.statistics import SKIPPED
from lit_prune.calibration.token_masks import TokenMasks
from lit_prune.distributed import shards
from lit_prune.errors import CalibrationError, UnsupportedModelError, UnsupportedStrategyError
from lit_prune.groups import GroupSet, Slice
from lit_prune.plan import ROTATED_ATTRIBUTE
from lit_prune.repair.stream_calls import norms_and_readers
from lit_prune.surgery.optimizer_search import find_optimizers
from lit_prune.surgery.turning import Turn, check_turnable, turn_parameter
from lit_prune.surgery.undoing import undo_all
from lit_prune.surgery.untying import untie_head


@torch.no_grad()
def rotate_hidden(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    optimizers: Iterable[Any] = (),
    *,
    root: nn.Module | None = None,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
) -> Callable[[], None]:
    """Turn a model's hidden states to their principal directions, in place; its outputs stay as they were.

    A head that is tied to the embedding becomes a parameter of its own, as it takes up the scale of the last norm.

    Of what optimizers remember, first moments (whatever has a sign) are turned as gradients are. Second moments have no exact
    counterpart, as products of different gradients are not known; they become what they would be if these averaged out,
    :math:`v' = v\\,(Q \\circ Q)`. Zeros in their place would let the next steps be some thirty times too long.

    Args:
        model: The model, or a module that holds one. Its norms over hidden states have to be root-mean-square norms, each
            read by linear layers alone.
        batches: Calibration batches, run once.
        forward: Runs one batch through the model.
        optimizers: Optimizers over its parameters.
        root: The module that holds the model, if ``forward`` runs more than the model.
        all_reduce: Sums a tensor over the processes that have batches of their own, if there are several.

    Returns:
        A function that undoes this, bit for bit; it holds a copy of what was turned, in CPU memory.

    Raises:
        UnsupportedModelError: If the model's hidden states cannot be turned; the message names the norm or layer.
        UnsupportedStrategyError: If its parameters are sharded.
        OptimizerStateError: If an optimizer has state that cannot be turned.
        CalibrationError: If no batch ran, or hidden states are not finite.
    """
    model = find_model(model)[1]
    rotation = find_rotation(model, batches, forward, root=root, all_reduce=all_reduce)
    return apply_rotation(model, rotation, optimizers, root=root)


@dataclass(frozen=True, eq=False)
class Rotation:
    """What hidden states are to be turned by.

    Args:
        folds: The norms over hidden states, by name, each with what reads it.
        directions: An orthogonal matrix with the principal directions as columns, the largest first.
    """

    folds: dict[str, _Fold]
    directions: Tensor


@torch.no_grad()
def find_rotation(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    *,
    root: nn.Module | None = None,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
) -> Rotation:
    """Return how the hidden states of a model are to be turned; the model stays as it is. See :func:`rotate_hidden`."""
    root = model if root is None else root
    channels = find_group_sets(model, hidden=True)[0]
    if shards.any_sharded(model.parameters()) is not None:
        raise UnsupportedStrategyError(
            "Hidden states of a model that FSDP2 shards cannot be turned. Rotate before sharding, or leave rotate_hidden out."
        )
    batches = list(batches)
    if not batches:
        raise CalibrationError("No calibration batch went through the model, so its hidden states cannot be turned.")
    folds = _folds(model, channels, lambda: forward(batches[0]), root)
    with evaluation_mode(root):
        moments = _second_moments(model, list(folds), batches, forward)
    if all_reduce is not None:
        moments = all_reduce(moments)
    if not bool(moments.isfinite().all()):
        raise CalibrationError("The hidden states of the calibration batches are not finite, so they cannot be turned.")
    # ascending: the last is the largest
    return Rotation(folds, torch.linalg.eigh(moments.double()).eigenvectors.flip(-1))


@torch.no_grad()
def apply_rotation(
    model: nn.Module, rotation: Rotation, optimizers: Iterable[Any] = (), *, root: nn.Module | None = None
) -> Callable[[], None]:
    """Turn the hidden states of a model, in place, and return a function that undoes it. See :func:`rotate_hidden`."""
    found = find_optimizers(list(optimizers), model if root is None else root)
    check_turnable(model, found, [part.parameter for part in find_group_sets(model, hidden=True)[0].slices])
    journal: list[Callable[[], None]] = []
    try:
        untie_head(model, found, journal)
        if not hasattr(model, ROTATED_ATTRIBUTE):
            journal.append(lambda: vars(model).pop(ROTATED_ATTRIBUTE, None))
            setattr(model, ROTATED_ATTRIBUTE, True)
        for turn in _turns(model, rotation.folds, rotation.directions):
            turn_parameter(model, turn, found, journal)
    except BaseException:
        undo_all(journal)
        raise

    def undo() -> None:
        with torch.no_grad():
            undo_all(journal)

    return undo


@dataclass(frozen=True)
class _Fold:
    """A norm whose scale goes into the layers that read it."""

    norm: str
    offset: float
    readers: tuple[Slice, ...]


def _folds(model: nn.Module, channels: GroupSet, run: Callable[[], Any], root: nn.Module) -> dict[str, _Fold]:
    """The norms over hidden states, each with the layers that read it.

    Raises:
        UnsupportedModelError: If a norm subtracts the mean or is not read by linear layers alone, or a layer reads hidden states
            past a norm.
    """
    named = type(model).__name__
    norms = stream_norms(model)
    for name in norms:
        if subtracts_mean(model.get_submodule(name)) or getattr(model.get_submodule(name), "bias", None) is not None:
            raise UnsupportedModelError(
                f"{name!r} of {named} ({type(model.get_submodule(name)).__name__}) subtracts the mean over the channels, or has a"
                " bias, so that hidden states cannot be turned; that takes root-mean-square norms. Leave rotate_hidden out:"
                " channels can be removed as they are."
            )
    readers = {part.module: part for part in channels.repairable}
    tied = _tied_readers(model, channels)
    with evaluation_mode(root):
        read = norms_and_readers(model, norms, [*readers, *tied], run)
    folds: dict[str, _Fold] = {}
    for name in norms:
        if not read.get(name):
            raise UnsupportedModelError(
                f"What {name!r} of {named} gives is read by no linear layer, but added to hidden states (or nothing runs it):"
                " its scale cannot be folded, so hidden states cannot be turned. Leave rotate_hidden out."
            )
        parts = tuple(readers[r] if r in readers else tied[r] for r in read[name])
        folds[name] = _Fold(name, scale_offset(model.get_submodule(name)), parts)
    seen = {r for found in read.values() for r in found}
    if unread := [r for r in (*readers, *tied) if r not in seen]:
        raise UnsupportedModelError(
            f"{unread[0]!r} of {named} does not read what a norm over hidden states gives in the first calibration batch, so"
            " hidden states cannot be turned. Leave rotate_hidden out."
        )
    return folds


def _tied_readers(model: nn.Module, channels: GroupSet) -> dict[str, Slice]:
    """The linear layers whose weight is an embedding: once untied they read hidden states by themselves."""
    written = {id(model.get_parameter(p.parameter)): p for p in channels.slices if not p.consumes}
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if (
            isinstance(module, nn.Linear)
            and id(weight) in written
            and f"{name}.weight" != written[id(weight)].parameter
        ):
            part = written[id(weight)]
            found[name] = Slice(f"{name}.weight", part.dim, part.index, part.dim)
    return found


def _second_moments(
    model: nn.Module, norms: Sequence[str], batches: Sequence[Any], forward: Callable[[Any], Any]
) -> Tensor:
    """Sum over tokens and norms of the products of the channels of what a norm reads, divided by its mean square."""
    masks = TokenMasks(model, norms)
    total: list[Tensor] = []
    of_batch: list[Tensor] = []

    def look(_: nn.Module, inputs: Tensor) -> None:
        if not is_observed():
            return
        x = inputs.detach()
        mask = masks.of(x)
        rows = (x if mask is None else x[mask]).reshape(-1, x.shape[-1]).float()
        rows = rows * rows.square().mean(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny).rsqrt()
        of_batch.append((rows.T @ rows).double() if rows.device.type != "mps" else rows.T @ rows)

    handles = []
    try:
        with masks:
            handles = [before_layer(model.get_submodule(n), look) for n in norms]
            for batch in batches:
                masks.start_batch(batch)
                of_batch.clear()
                if forward(batch) is not SKIPPED:
                    total[:] = [sum((*total, *of_batch))]  # type: ignore[list-item]
    finally:
        for handle in handles:
            handle.remove()
    if not total or not isinstance(total[0], Tensor):
        raise CalibrationError("No calibration batch went through the model, so its hidden states cannot be turned.")
    return total[0]


def _turns(model: nn.Module, folds: dict[str, _Fold], directions: Tensor) -> list[Turn]:
    """What is multiplied with what."""
    channels = find_group_sets(model, hidden=True)[0]
    scales: dict[str, Tensor] = {}
    turns = []
    for fold in folds.values():
        weight = model.get_parameter(f"{fold.norm}.weight")
        scale = weight.detach().double() + fold.offset
        scales |= {part.parameter: scale for part in fold.readers}
        turns.append(Turn(f"{fold.norm}.weight", 0, None, constant=1.0 - fold.offset))
    turned = {f"{fold.norm}.weight" for fold in folds.values()}
    for part in channels.slices:
        if part.parameter not in turned:
            turns.append(Turn(part.parameter, part.dim, directions, scales.get(part.parameter)))
    return turns
