"""From labels that belong together to group sets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lit_prune.architectures.plain_modules import LINEAR
from lit_prune.architectures.tracing.labels import Atoms
from lit_prune.architectures.tracing.mode import PROTECTED, LabelTracer
from lit_prune.groups import Attribute, GroupSet, Slice, group_cost

ATTENTION, MLP, CHANNEL = "attention", "mlp", "channel"


@dataclass(frozen=True, eq=False)
class FoundSet:
    """A group set, and what else tracing knows of it.

    Args:
        group_set: The set.
        modules: Names of the modules that gave tensors with these groups another shape, and may count the groups.
        is_heads: Whether the groups lie side by side in products of activations, as heads do.
        sizes: Numbers in lists of the modules that a run split these groups by.
        counted: Numbers of the modules that may count these groups, with others, in shapes and slices.
        shapes: Numbers in lists of the modules that a run used as a shape with these groups.
    """

    group_set: GroupSet
    modules: tuple[str, ...]
    is_heads: bool = False
    sizes: tuple[Attribute, ...] = ()
    counted: tuple[Attribute, ...] = ()
    shapes: tuple[Attribute, ...] = ()


Signature = tuple[tuple[int, int], ...]


def join_shared_sizes(model: nn.Module, tracer: LabelTracer) -> None:
    """Unite what one integer of a module counts: the hidden units of all layers and directions of a recurrent module."""
    by_name = {(a.name, a.dim): a for a in tracer.labels.atoms}
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            own = [n for n, _ in module.named_parameters(prefix=name)]
            found = [by_name.get((n, 1)) for n in own if n.rpartition(".")[2].startswith("weight_hh")]
            hidden = [a for a in found if a is not None]
            for atoms in hidden[1:]:
                tracer.labels.unite(hidden[0].labels(), atoms.labels())


def find_sets(
    model: nn.Module, tracer: LabelTracer, protected: Collection[str], kind: str | None = None
) -> list[FoundSet]:
    """The group sets of a traced model, in the order in which the run used them first.

    Args:
        model: The model.
        tracer: What was learnt of a run.
        protected: Names of parameters that stay whole.
        kind: What all groups are called; by what they are if ``None``.
    """
    labels = tracer.labels
    join_shared_sizes(model, tracer)
    for atoms in labels.atoms:
        if atoms.name in protected:
            labels.freeze(atoms.labels(), PROTECTED)
    labels.settle()
    classes = labels.classes()
    frozen = np.zeros(labels.count, dtype=bool)
    for roots, _ in labels.frozen():
        frozen[roots] = True
    counted, shapes = counted_numbers(model, tracer, classes), shape_numbers(model, tracer, classes)
    by_signature = _by_signature(labels.atoms, classes, frozen, split_sizes(model, tracer, classes))
    heads = {int(c) for f in tracer.side_by_side for c in np.unique(classes[f.numpy()])}
    reshaped: dict[int, dict[str, None]] = defaultdict(dict)
    for module, fields in tracer.reshaped:
        for root in np.unique(classes[fields.numpy()]):
            reshaped[int(root)][module] = None
    sets = []
    for (signature, sizes), members in by_signature.items():
        is_heads = not heads.isdisjoint(members)
        found = _build(model, tracer, signature, members, is_heads)
        if found is not None:
            modules = tuple(sorted({m for root in list(members)[:2] for m in reshaped[root]}))
            named = found if kind is None else replace(found, kind=kind)
            first = next(iter(members))
            sets.append(FoundSet(named, modules, is_heads, sizes, counted.get(first, ()), shapes.get(first, ())))
    return _with_unique_keys(sorted(sets, key=lambda f: f.group_set.layer))


def split_sizes(model: nn.Module, tracer: LabelTracer, classes: np.ndarray) -> dict[int, tuple[Attribute, ...]]:
    """By class, the numbers in lists and tuples of modules that count its positions, since the modules split by them.

    Args:
        model: The model.
        tracer: What was learnt of a run.
        classes: The class of every label.
    """
    return _by_class(
        (path, f"{name}[{number}]", part)
        for path, sizes, labels in tracer.splits
        for name, value in sequences_of(model.get_submodule(path))
        if value == sizes
        for number, part in enumerate(np.split(classes[labels.numpy()], np.cumsum(sizes)[:-1]))
    )


def counted_numbers(model: nn.Module, tracer: LabelTracer, classes: np.ndarray) -> dict[int, tuple[Attribute, ...]]:
    """By class, the integers of modules that may count its positions, in a shape or a slice, those of other classes with them.

    Args:
        model: The model.
        tracer: What was learnt of a run.
        classes: The class of every label.
    """
    return _by_class(
        (path, name, classes[labels.numpy()])
        for path, labels in tracer.counted
        for name, value in elements_of(model.get_submodule(path))
        if value == len(labels)
    )


def shape_numbers(model: nn.Module, tracer: LabelTracer, classes: np.ndarray) -> dict[int, tuple[Attribute, ...]]:
    """By class, the numbers in lists and tuples that count its positions, since these stand side by side in a shape of a run.

    Args:
        model: The model.
        tracer: What was learnt of a run.
        classes: The class of every label.
    """
    return _by_class(
        (owner, f"{name}[{dim - start}]", classes[labels.numpy()])
        for path, shape, dim, labels in tracer.shapes
        # a method of a part may give the shape, too
        for owner in (path, *(f"{path}.{n}".lstrip(".") for n, _ in model.get_submodule(path).named_children()))
        for name, value in sequences_of(model.get_submodule(owner))
        if len(value) > 1
        for start in range(max(0, dim - len(value) + 1), dim + 1)
        if shape[start : start + len(value)] == value
    )


def _by_class(numbers: Iterable[tuple[str, str, np.ndarray]]) -> dict[int, tuple[Attribute, ...]]:
    """By class, the numbers that count its positions.

    Args:
        numbers: Of every number its module, its name, and the classes of the positions that it counts.
    """
    found: dict[int, dict[tuple[str, str], int]] = defaultdict(dict)
    for path, name, positions in numbers:
        roots, counts = np.unique(positions, return_counts=True)
        for root, count in zip(roots.tolist(), counts.tolist(), strict=True):
            found[root][path, name] = count
    return {
        root: tuple(Attribute(path, name, count, shared=True) for (path, name), count in parts.items())
        for root, parts in found.items()
    }


def numbers_of(module: nn.Module) -> Iterator[tuple[str, int]]:
    """The integers above 1 of a module of the user's own, by name."""
    if not is_standard(module):
        yield from ((name, value) for name, value in vars(module).items() if _is_integer(value) and value > 1)


def sequences_of(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The lists and tuples of integers of a module of the user's own, by name."""
    if not is_standard(module):
        for name, value in vars(module).items():
            if type(value) in (list, tuple) and all(_is_integer(v) for v in value):
                yield name, tuple(value)


def elements_of(module: nn.Module) -> Iterator[tuple[str, int]]:
    """What :func:`numbers_of` and :func:`sequences_of` give, number by number, by the names of :class:`Attribute`."""
    yield from numbers_of(module)
    for name, values in sequences_of(module):
        yield from ((f"{name}[{number}]", value) for number, value in enumerate(values))


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_standard(module: nn.Module) -> bool:
    """Whether a module's integers are PyTorch's, which follow its parameters."""
    return type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.MultiheadAttention)


def _by_signature(
    atoms: Sequence[Atoms], classes: np.ndarray, frozen: np.ndarray, sizes: Mapping[int, tuple[Attribute, ...]]
) -> dict[tuple[Signature, tuple[Attribute, ...]], dict[int, list[np.ndarray]]]:
    """By how many positions of which parameters they have, and of which parts, the classes, each with its positions."""
    members: dict[int, list[tuple[int, np.ndarray]]] = defaultdict(list)
    for number, one in enumerate(atoms):
        own = classes[one.start : one.start + one.size]
        order = np.argsort(own, kind="stable")
        roots, starts = np.unique(own[order], return_index=True)
        ends = [*starts[1:].tolist(), one.size]
        for root, start, end in zip(roots.tolist(), starts.tolist(), ends, strict=True):
            positions = order[start:end]
            if not frozen[root] and len(positions) < one.size:
                members[root].append((number, positions))
            else:
                frozen[root] = True
    found: dict[tuple[Signature, tuple[Attribute, ...]], dict[int, list[np.ndarray]]] = defaultdict(dict)
    for root, parts in members.items():
        if not frozen[root]:
            signature = tuple((n, len(p)) for n, p in parts)
            found[signature, sizes.get(root, ())][root] = [p for _, p in parts]
    return found


def _build(
    model: nn.Module,
    tracer: LabelTracer,
    signature: Signature,
    members: dict[int, list[np.ndarray]],
    is_heads: bool,
) -> GroupSet | None:
    atoms = [tracer.labels.atoms[number] for number, _ in signature]
    read = [tracer.read.get((a.name, a.dim)) is not None and not a.is_buffer for a in atoms]
    produced = [a for a, r in zip(atoms, read, strict=True) if not r and not a.is_buffer]
    if len(members) < 2 or not any(read) or not produced:
        return None
    first = min(produced, key=lambda a: tracer.first_use.get(a.name, len(tracer.first_use)))
    # the order of the groups is that of the positions in the parameter that makes them
    at = next(i for i, a in enumerate(atoms) if a is first)
    ordered = sorted(members.values(), key=lambda parts: int(parts[at].min()))
    slices, buffers = [], []
    for number, one in enumerate(atoms):
        index = torch.from_numpy(np.stack([parts[number] for parts in ordered]))
        if one.is_buffer:
            buffers.append(Slice(one.name, one.dim, index))
        else:
            slices.append(_slice(model, tracer, one, index))
    slices.sort(key=lambda s: (tracer.first_use.get(s.parameter, len(tracer.first_use)), s.dim))
    parts = tuple(slices)
    kind = ATTENTION if is_heads else _kind(model, parts)
    name = first.name.rpartition(".")[0]
    layer = tracer.first_use.get(first.name, len(tracer.first_use))
    return GroupSet(
        name,
        layer,
        kind,
        len(ordered),
        group_cost(model, parts),
        parts,
        minimum=1,
        buffers=tuple(buffers),
    )


def _slice(model: nn.Module, tracer: LabelTracer, atoms: Atoms, index: torch.Tensor) -> Slice:
    module = model.get_submodule(atoms.name.rpartition(".")[0])
    dims = [d for (name, d) in tracer.read if name == atoms.name]
    input_dim = atoms.dim if atoms.dim in dims else min(dims, default=None)
    inside = all(inside for (name, _), inside in tracer.read.items() if name == atoms.name)
    linear = isinstance(module, LINEAR) and atoms.name.rpartition(".")[2] == "weight"
    return Slice(
        atoms.name,
        atoms.dim,
        index,
        input_dim,
        unobservable_input=input_dim is not None and not (linear and inside),
        only_in_training=atoms.name not in tracer.first_use,
    )


def _kind(model: nn.Module, slices: Sequence[Slice]) -> str:
    owners = [model.get_submodule(s.module) for s in slices]
    return MLP if all(isinstance(m, nn.Linear | Conv1D) for m in owners) else CHANNEL


def _with_unique_keys(sets: Sequence[FoundSet]) -> list[FoundSet]:
    """The sets with layers counted from 0 and, where several start in one module, names of other modules of theirs."""
    taken: set[tuple[str, str]] = set()
    renamed = []
    for layer, item in enumerate(sets):
        found = item.group_set
        names = dict.fromkeys([found.name, *(s.module for s in found.slices)])
        name = next((n for n in names if (n, found.kind) not in taken), found.name)
        kind, number = found.kind, 2
        while (name, kind) in taken:
            kind, number = f"{found.kind}_{number}", number + 1
        taken.add((name, kind))
        renamed.append(replace(item, group_set=replace(found, name=name, kind=kind, layer=layer)))
    return renamed
