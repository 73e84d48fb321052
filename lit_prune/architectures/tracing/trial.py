"""Masking and cutting of groups for a moment, to compare what the model computes either way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lit_prune.architectures.module_sizes import sync_sizes
from lit_prune.groups import GroupSet
from lit_prune.torch_internals import tables


@contextlib.contextmanager
def masked(model: nn.Module, sets: Sequence[GroupSet], removed: Sequence[Tensor]) -> Iterator[None]:
    """The model while the weights that read some groups are zero.

    Args:
        model: The model.
        sets: Group sets.
        removed: For every set, the indices of the groups.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with _values_put_back() as keep:
        for group_set, groups in zip(sets, removed, strict=True):
            for part in group_set.consumers:
                data = keep(parameters[part.parameter])
                data.index_fill_(part.dim, part.index[groups].flatten().to(data.device), 0)
        torch.clear_autocast_cache()
        yield


@contextlib.contextmanager
def _values_put_back() -> Iterator[Callable[[Tensor], Tensor]]:
    """Give what returns the data of a tensor to change in place; all tensors have the values of before at the end."""
    before: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in before:
            before[id(tensor)] = tensor, tensor.data.clone()
        return tensor.data

    try:
        yield keep
    finally:
        for tensor, values in before.values():
            tensor.data.copy_(values)
        torch.clear_autocast_cache()


@contextlib.contextmanager
def without(model: nn.Module, sets: Sequence[GroupSet], removed: Sequence[Tensor]) -> Iterator[None]:
    """The model while some groups are removed from it.

    Args:
        model: The model.
        sets: Group sets.
        removed: For every set, the indices of the groups.
    """
    undo: list[Callable[[], None]] = []
    try:
        _cut(model, sets, removed, undo)
        torch.clear_autocast_cache()
        yield
    finally:
        for step in reversed(undo):
            step()
        torch.clear_autocast_cache()


def _cut(model: nn.Module, sets: Sequence[GroupSet], removed: Sequence[Tensor], undo: list[Callable[[], None]]) -> None:
    tensors: dict[str, Tensor] = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    stay: dict[tuple[str, int], Tensor] = {}
    for group_set, groups in zip(sets, removed, strict=True):
        for part in (*group_set.slices, *group_set.buffers):
            length = tensors[part.parameter].shape[part.dim]
            mask = stay.setdefault((part.parameter, part.dim), torch.ones(length, dtype=torch.bool))
            mask[part.index[groups].flatten()] = False
    places: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        parameters, buffers, _ = tables(module)
        for tensor in (*parameters.values(), *buffers.values()):
            if tensor is not None:
                places.setdefault(id(tensor), []).append(module)
    touched: dict[int, nn.Module] = {}
    for (name, dim), mask in stay.items():
        tensor = tensors[name]
        undo.append(_restore(tensor, tensor.data))
        tensor.data = tensor.data.index_select(dim, mask.nonzero().flatten().to(tensor.device))
        touched.update((id(m), m) for m in places[id(tensor)])
    undo.extend([sync_sizes(module) for module in touched.values()])
    for group_set, groups in zip(sets, removed, strict=True):
        kept = group_set.kept_to_removed(groups.tolist())
        for attribute in group_set.attributes:
            module = model.get_submodule(attribute.module)
            name, value = attribute.followed(module, len(kept), len(groups))
            undo.append(_reset(module, name, getattr(module, name)))
            setattr(module, name, value)
        for adaptation in group_set.adaptations:
            undo.append(adaptation.apply(model.get_submodule(adaptation.module), kept))


def _restore(tensor: Tensor, data: Tensor) -> Callable[[], None]:
    def undo() -> None:
        tensor.data = data

    return undo


def _reset(module: nn.Module, name: str, value: object) -> Callable[[], None]:
    return lambda: setattr(module, name, value)


@contextlib.contextmanager
def training_mode(root: nn.Module) -> Iterator[None]:
    """Training mode; modes, and parameters and buffers that forward changes (moving averages), as before at the end."""
    modes = [(module, module.training) for module in root.modules()]
    tensors = [(t, t.data, t.data.clone()) for t in (*root.parameters(), *root.buffers()) if not t.is_meta]
    try:
        root.train()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for tensor, data, values in tensors:
            tensor.data = data
            tensor.data.copy_(values)


# length of a row of a weight that makes queries and keys: with inputs of unit variance, the logits of attention vary by 2
_LOUD = 1.5


@contextlib.contextmanager
def loud_weights(model: nn.Module, sets: Sequence[GroupSet]) -> Iterator[None]:
    """The model with the weights that make some groups scaled up where they are small, so that attention tells positions apart.

    The logits of a new model are so near to zero that a wrong scale of theirs (by a number of heads, or the number of features
    that are left) makes hardly a difference.

    Args:
        model: The model.
        sets: Group sets of heads or of their features.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = dict.fromkeys(s.parameter for g in sets for s in g.slices if not s.consumes)
    weights = {id(p): p for p in (parameters[n] for n in names) if p.dim() > 1 and p.is_floating_point()}
    with _values_put_back() as keep:
        for weight in weights.values():
            length = float(weight.data.flatten(1).float().square().sum(dim=1).mean().sqrt())
            if 0 < length < _LOUD:
                keep(weight).mul_(_LOUD / length)
        torch.clear_autocast_cache()
        yield


@contextlib.contextmanager
def telling_values(model: nn.Module) -> Iterator[None]:
    """The model with random values where a parameter is constant or tiny, so that no wrong cut hides behind zeros.

    Residual branches often start at zero (zero scales of norms, layer scales of 1e-5): what is computed in them would make
    no difference.
    """
    generator = torch.Generator().manual_seed(0)
    seen: set[int] = set()
    with _values_put_back() as keep:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point() or tensor.numel() < 2 or id(tensor) in seen or tensor.is_meta:
                continue
            seen.add(id(tensor))
            flat = tensor.data.flatten()
            if not (bool((flat == flat[0]).all()) or float(flat.abs().max()) < 1e-3):
                continue
            values = torch.rand(tensor.shape, generator=generator) + 0.5
            constant = float(flat[0]) if bool((flat == flat[0]).all()) else 0.0
            usual = (tensor.numel() / len(tensor)) ** -0.5 if tensor.dim() > 1 else 1.0
            if constant:
                # of the same sign: it may be a variance, or go into a logarithm
                values *= constant if abs(constant) >= 1e-3 else usual if constant > 0 else -usual
            elif tensor.dim() > 1:
                values = (values - 1) * 2 * usual
            elif "bias" in name or "mean" in name:
                values = (values - 1) * 0.2
            keep(tensor).copy_(values)
        torch.clear_autocast_cache()
        yield
