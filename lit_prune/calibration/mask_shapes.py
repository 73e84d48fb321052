"""Brings masks of every form to one: a bool tensor that is True at real positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.transformers_internals import frames_of

# additive masks hold less than this where nothing is to be seen, and biases (ALiBi) more
_HIDDEN = -1e4


def visible(mask: Tensor, inverted: bool = False) -> Tensor:
    """Where a mask lets something through, as a bool tensor of its shape.

    Args:
        mask: Of bools, of integers (not 0 is visible), or of floats: additive, 0 where visible and far below 0 where not, or,
            if none is below 0, 1 and 0.
        inverted: Whether True, or not 0 for integers, means hidden. Floats are additive then.
    """
    if not mask.is_floating_point():
        return (mask == 0) if inverted else (mask != 0)
    shown = mask > _HIDDEN
    if inverted:
        return shown
    additive = (mask < 0).any() | (mask == 0).all()
    return torch.where(additive, shown, mask != 0)


def seen_positions(pattern: Tensor, batch: int) -> Tensor | None:
    """The positions that any query sees.

    A position that sees nothing but itself, and that nothing else sees, is padding as well: many masks leave the diagonal open
    so that a softmax has something to sum up to one over.

    Args:
        pattern: True where a query sees a key, shape ``(queries, keys)``, ``(batch, queries, keys)``, ``(batch * heads,
            queries, keys)`` or ``(batch, heads, queries, keys)``; ones in place of batch, heads and queries are allowed.
        batch: Size of the batch.

    Returns:
        Bool tensor of shape ``(batch, keys)`` or ``(1, keys)``; ``None`` if the pattern is of another batch.
    """
    queries, keys = pattern.shape[-2:]
    pattern = pattern.reshape(-1, *pattern.shape[-3:]) if pattern.dim() > 3 else pattern.reshape(-1, 1, queries, keys)
    if len(pattern) not in (1, batch):
        if pattern.shape[1] != 1 or len(pattern) % batch:
            return None
        pattern = pattern.view(batch, -1, queries, keys)
    pairs = pattern.any(dim=1)
    seen = pairs.any(dim=1)
    if queries == keys and keys > 1:
        alone = pairs.diagonal(dim1=1, dim2=2) & (pairs.sum(dim=1) == 1) & (pairs.sum(dim=2) == 1)
        connected = seen & ~alone
        seen = torch.where(connected.any(dim=-1, keepdim=True), connected, seen)
    return seen


def in_frames(module: nn.Module, mask: Tensor, positions: int) -> Tensor | None:
    """A mask of samples or input frames as one of the positions that a speech model makes of them, by its own methods.

    Args:
        module: The module that was called with the mask.
        mask: True at real samples, shape ``(batch, samples)``.
        positions: How many positions there are.

    Returns:
        Bool tensor of shape ``(batch, positions)``; ``None`` if the module has no such method, or it gives another number.
    """
    lengths = frames_of(module)
    if lengths is None:
        return None
    found = lengths(torch.cat([mask.sum(dim=-1), mask.new_tensor([mask.shape[1]], dtype=torch.long)]))
    for given in found if isinstance(found, tuple) else (found,):
        if int(given[-1]) == positions:
            return torch.arange(positions, device=mask.device) < given[:-1, None]
    return None


def fitted(mask: Tensor, lead: Sequence[int], batch_dim: int = 0) -> Tensor | None:
    """A mask in the shape of hidden states without their features.

    Args:
        mask: Shape ``(batch, positions)``, ``(1, positions)`` or ``(positions,)``.
        lead: That shape: ``(batch, positions)``, ``(positions, batch)``, flattened, or with positions in two dimensions.
        batch_dim: 1 if the hidden states lie with positions first.

    Returns:
        The mask, or ``None`` if it is of other positions.
    """
    lead = torch.Size(lead)
    if mask.dim() == 2 and len(mask) == 1 and len(lead) == 2:
        mask = mask.expand(lead[batch_dim], -1)
    ways = [mask] if mask.dim() < 2 else [mask.T, mask] if batch_dim else [mask]
    for way in ways:
        if way.shape == lead:
            return way
    if mask.numel() != lead.numel():
        return None
    if len(lead) == 1:
        return ways[0].flatten()
    return mask.reshape(lead) if mask.dim() == 2 and len(mask) == lead[0] else None


def masks_in(batch: Any, depth: int = 4) -> list[Tensor]:
    """The tensors that a batch calls ``attention_mask``: a mapping, a (data) class with fields, sequences, nested."""
    if depth == 0:
        return []
    if is_dataclass(batch) and not isinstance(batch, type):
        parts = {f.name: getattr(batch, f.name) for f in fields(batch)}
    elif isinstance(batch, Mapping):
        parts = dict(batch)
    elif isinstance(batch, tuple) and hasattr(batch, "_asdict"):
        parts = batch._asdict()
    elif isinstance(batch, (list, tuple)):
        return [mask for part in batch for mask in masks_in(part, depth - 1)]
    else:
        return []
    found = [parts["attention_mask"]] if isinstance(parts.get("attention_mask"), Tensor) else []
    return found + [mask for value in parts.values() for mask in masks_in(value, depth - 1)]
