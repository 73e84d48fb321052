"""Bytes of the weights and of the key/value cache, as functions of how many groups of each set stay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_prune.budgets.sizes import SizeModel, SizeSum
from lit_prune.budgets.workloads import Workload
from lit_prune.groups import BLOCK, GroupSet, is_inside

# lengths of two caches, from which those of longer ones follow
_SHORT = (3, 5)


@dataclass(frozen=True)
class CacheTensor:
    """One tensor of a key/value cache.

    Args:
        layer: Index of the layer whose state it is.
        shape: Its shape for one sequence; the length is that of one token.
        sequence_dim: Dimension along which it grows with the length, ``None`` if it does not.
        most: Most tokens that it holds, ``None`` if it holds all.
        dtype: Its data type.
    """

    layer: int
    shape: tuple[int, ...]
    sequence_dim: int | None
    most: int | None
    dtype: torch.dtype

    def size(self, batch: int, length: int, dtype: torch.dtype | None) -> int:
        """Bytes for so many sequences of so many tokens, floating-point numbers in ``dtype``."""
        tokens = 1 if self.sequence_dim is None else length if self.most is None else min(length, self.most)
        elements = int(np.prod(self.shape, dtype=np.int64)) * batch * tokens
        held = dtype if dtype is not None and self.dtype.is_floating_point else self.dtype
        return elements * held.itemsize


def cache_tensors(workload: Workload) -> list[CacheTensor]:
    """The tensors of the model's key/value cache, learnt from two short runs; none if it has no cache."""
    first, second = (workload.cache(length) for length in _SHORT)
    if first is None:
        return []
    found = []
    for layer, (a, b) in enumerate(zip(_layers(first), _layers(second), strict=True)):
        window = getattr(a, "sliding_window", None) if getattr(a, "is_sliding", False) else None
        for short, longer in zip(_tensors(a), _tensors(b), strict=True):
            grows = [d for d in range(short.dim()) if short.shape[d] != longer.shape[d]]
            shape = list(short.shape)
            if grows:
                shape[grows[0]] = 1
            # of a window, all but the token to come are held
            most = None if window is None or not grows else window - 1
            found.append(CacheTensor(layer, tuple(shape), grows[0] if grows else None, most, short.dtype))
    if any(tensor.sequence_dim is not None for tensor in found):
        workload.check_length()
    return found


def count_memory(workload: Workload, dtype: torch.dtype | None = None) -> int:
    """Bytes of the parameters (tied ones once) and of the key/value cache of the workload's sequences.

    Args:
        workload: The model, the number of sequences and their length.
        dtype: What floating-point numbers are held in; as they are if ``None``.
    """
    weights = sum(p.numel() * _itemsize(p, dtype) for p in workload.model.parameters())
    return weights + sum(t.size(workload.batch, workload.length, dtype) for t in cache_tensors(workload))


def memory_model(workload: Workload, group_sets: Sequence[GroupSet], dtype: torch.dtype | None = None) -> SizeSum:
    """Bytes of weights and cache as a function of how many groups stay in every set.

    The cache of a layer is in proportion to the groups of its attention where its second dimension, the heads, is.
    """
    sizes = SizeModel(workload.model, group_sets)
    parameters = dict(workload.model.named_parameters())
    weight = np.array([_itemsize(parameters[name], dtype) for name in sizes.names], dtype=np.int64)
    per_group, constant = np.zeros(len(group_sets), dtype=np.int64), 0
    sets = _sets_of_layers(workload.model, group_sets)
    for tensor in cache_tensors(workload):
        size = tensor.size(workload.batch, workload.length, dtype)
        number = sets.get(tensor.layer)
        if number is not None and len(tensor.shape) > 1 and tensor.shape[1] % group_sets[number].size == 0:
            per_group[number] += size // group_sets[number].size
        else:
            constant += size
    return SizeSum(sizes, weight, per_group, constant)


def _itemsize(parameter: Tensor, dtype: torch.dtype | None) -> int:
    return parameter.element_size() if dtype is None or not parameter.is_floating_point() else dtype.itemsize


def _layers(cache: Any) -> Sequence[Any]:
    """The layers of a cache, those of an encoder and a decoder one after the other."""
    parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    if any(part is not None for part in parts):
        return [layer for part in parts if part is not None for layer in part.layers]
    return getattr(cache, "layers", [])


def _tensors(layer: Any) -> Iterable[Tensor]:
    for value in vars(layer).values():
        if isinstance(value, Tensor) and value.dim() > 1:
            yield value


def _sets_of_layers(model: nn.Module, group_sets: Sequence[GroupSet]) -> dict[int, int]:
    """By index of a layer of the cache, the set of its attention."""
    found: dict[int, int] = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int):
            continue
        for number, group_set in enumerate(group_sets):
            if group_set.kind != BLOCK and is_inside(group_set.name, name) and group_set.name == name:
                found.setdefault(index, number)
    return found
