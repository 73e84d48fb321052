"""Bytes of the weights and of the cache, as functions of how many groups of each set stay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache

from lit_prune.budgets.running import running_modules
from lit_prune.budgets.sizes import SizeModel, SizeSum, block_around, innermost_sets
from lit_prune.budgets.workloads import Workload
from lit_prune.errors import BudgetError
from lit_prune.groups import GroupSet

# lengths of two caches, from which those of longer ones follow
_SHORT = (3, 5)

# where in a cache a tensor is: the object of its layer, the name of a field, the key if that holds several
_Place = tuple[int, str, Any]


@dataclass(frozen=True)
class CacheTensor:
    """One tensor of a cache: keys, values, or a state.

    Args:
        module: Qualified name of the module that puts it there.
        shape: Its shape for one sequence; the length is that of one token.
        sequence_dim: Dimension along which it grows with the length, ``None`` if it does not.
        most: Most tokens that it holds, ``None`` if it holds all.
        dtype: Its data type.
    """

    module: str
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
    """The tensors of the model's cache, learnt from two short runs; none if it has no cache.

    Raises:
        BudgetError: If no module is called with the cache, or the model has too few positions for a cache that grows.
    """
    with _recorded(workload.model) as modules:
        first = workload.cache(_SHORT[0])
    second = workload.cache(_SHORT[1])
    if first is None:
        return []
    found = []
    for (layer, place, short), (_, _, longer) in zip(_tensors(first), _tensors(second), strict=True):
        if place not in modules:
            raise BudgetError(
                f"A budget of memory needs to know which module of {type(workload.model).__name__} puts what into its cache; none"
                f" of them is called with the {type(first).__name__}. Use a budget of params."
            )
        grows = [d for d in range(short.dim()) if short.shape[d] != longer.shape[d]]
        shape = list(short.shape)
        if grows:
            shape[grows[0]] = 1
        window = getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", False) else None
        # of a window, all but the token to come are held
        most = None if window is None or not grows else window - 1
        found.append(CacheTensor(modules[place], tuple(shape), grows[0] if grows else None, most, short.dtype))
    if any(tensor.sequence_dim is not None for tensor in found):
        workload.check_length()
    return found


def count_memory(workload: Workload, dtype: torch.dtype | None = None) -> int:
    """Bytes of the parameters (tied ones once) and of the cache of the workload's sequences.

    Args:
        workload: The model, the number of sequences and their length.
        dtype: What floating-point numbers are held in; as they are if ``None``.
    """
    weights = sum(p.numel() * _itemsize(p, dtype) for p in workload.model.parameters())
    return weights + sum(t.size(workload.batch, workload.length, dtype) for t in cache_tensors(workload))


def memory_model(workload: Workload, group_sets: Sequence[GroupSet], dtype: torch.dtype | None = None) -> SizeSum:
    """Bytes of weights and cache as a function of how many groups stay in every set.

    What a module keeps in the cache belongs to the set of that module, or of the innermost one around it, see
    :func:`_per_group`. The rest leaves with the block around it, or stays.

    Raises:
        BudgetError: See :func:`cache_tensors`.
    """
    sizes = SizeModel(workload.model, group_sets)
    parameters = dict(workload.model.named_parameters())
    weight = np.array([_itemsize(parameters[name], dtype) for name in sizes.names], dtype=np.int64)
    per_group, constant = np.zeros(len(group_sets), dtype=np.int64), 0
    for tensor in cache_tensors(workload):
        rest = tensor.size(workload.batch, workload.length, dtype)
        for number in innermost_sets(tensor.module, group_sets):
            if of_group := _per_group(workload.model, group_sets[number], tensor.shape, rest):
                per_group[number] += of_group
                rest -= of_group * group_sets[number].size
                break
        block = block_around(tensor.module, group_sets)
        if block is None:
            constant += rest
        else:
            per_group[block] += rest
    return SizeSum(sizes, weight, per_group, constant)


def _per_group(model: nn.Module, group_set: GroupSet, shape: tuple[int, ...], size: int) -> int:
    """Bytes that go with one group, of a tensor whose second dimension is that of heads or channels; 0 if none do.

    The dimension is as long as that of a parameter whose rows the groups are (some of), or it is heads in equal shares.
    """
    if len(shape) < 2:
        return 0
    for part in group_set.slices:
        if model.get_parameter(part.parameter).shape[part.dim] == shape[1]:
            return size // shape[1] * len(part.index[0].unique())
    return size // group_set.size if shape[1] % group_set.size == 0 else 0


def _itemsize(parameter: Tensor, dtype: torch.dtype | None) -> int:
    return parameter.element_size() if dtype is None or not parameter.is_floating_point() else dtype.itemsize


@contextlib.contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[_Place, str]]:
    """By its place in the cache, the innermost module that runs when a tensor is first there."""
    found: dict[_Place, str] = {}

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *__: Any) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Cache):
                for place in [place for _, place, _ in _tensors(value)]:
                    found.setdefault(place, running[-1] if running else "")

    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            hooks.callback(module.register_forward_pre_hook(look, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(look, with_kwargs=True).remove)
        running = hooks.enter_context(running_modules(model))
        yield found


def _layers(cache: Any) -> Sequence[Any]:
    """The layers of a cache, those of an encoder and a decoder one after the other."""
    parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    if any(part is not None for part in parts):
        return [layer for part in parts if part is not None for layer in part.layers]
    return getattr(cache, "layers", [])


def _tensors(cache: Any) -> Iterable[tuple[Any, _Place, Tensor]]:
    """The layer, the place and the values of every tensor; layers of state-space models hold dictionaries of them."""
    for layer in _layers(cache):
        for name, value in vars(layer).items():
            for key, tensor in (value if isinstance(value, dict) else {None: value}).items():
                if isinstance(tensor, Tensor) and tensor.dim() > 1:
                    yield layer, (id(layer), name, key), tensor
