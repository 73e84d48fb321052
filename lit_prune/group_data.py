"""Group sets as plain data: kept beside a model that no description covers, and written into its plans.

A description finds the groups of a model anew after every cut. Groups that were found by running the model are kept on it
instead, and follow each cut. As data in a plan they let the plan be applied to a fresh dense model, without running it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_prune.arguments import MOST_GROUPS
from lit_prune.errors import PlanError
from lit_prune.groups import Adaptation, Attribute, GroupSet, Slice, group_cost

FORMAT = "lit_prune.groups"
VERSION = 1
GROUPS_ATTRIBUTE = "_lit_prune_groups"
AdaptModule = Callable[[nn.Module, Tensor], Callable[[], None]]
_RUN = re.compile(r"(\d+)(?:-(\d+)(?:/(-?\d+))?)?")


@dataclass(frozen=True)
class KeptGroups:
    """The group sets that a model without a description has as it is now.

    Args:
        group_sets: The group sets.
        lengths: Length of every dimension that a slice lies along, by parameter or buffer and dimension.
    """

    group_sets: tuple[GroupSet, ...]
    lengths: Mapping[tuple[str, int], int]


def kept_groups(model: nn.Module) -> KeptGroups | None:
    """What is kept beside the model, as it is now; ``None`` if nothing is."""
    kept = vars(model).get(GROUPS_ATTRIBUTE)
    return kept if isinstance(kept, KeptGroups) else None


def kept_group_sets(model: nn.Module) -> tuple[GroupSet, ...] | None:
    """The group sets that are kept beside the model, as it is now; ``None`` if none are."""
    kept = kept_groups(model)
    return None if kept is None else kept.group_sets


def keep_group_sets(model: nn.Module, group_sets: Iterable[GroupSet]) -> None:
    """Keep group sets beside the model. They are no part of its state dict; copies and pickles of the model have them."""
    sets = tuple(group_sets)
    setattr(model, GROUPS_ATTRIBUTE, KeptGroups(sets, dimension_lengths(model, sets)))


def dimension_lengths(model: nn.Module, group_sets: Iterable[GroupSet]) -> dict[tuple[str, int], int]:
    """Length of every dimension that a slice lies along, by parameter or buffer and dimension; 0 where there is none."""
    tensors = tensors_of(model)
    places = dict.fromkeys((p.parameter, p.dim) for s in group_sets for p in chain(s.slices, s.buffers))
    known = {place: tuple(tensors[place[0]].shape) if place[0] in tensors else () for place in places}
    return {(name, dim): shape[dim] if dim < len(shape) else 0 for (name, dim), shape in known.items()}


@dataclass(frozen=True)
class GroupData:
    """Group sets as text, with the shapes that the parameters and buffers have in the model that they are of.

    Args:
        text: JSON in one fixed notation, so that equal group sets give equal text.
    """

    text: str

    @classmethod
    def pack(cls, model: nn.Module, group_sets: Sequence[GroupSet], name_of: Callable[[Adaptation], str]) -> GroupData:
        """The group sets of a model as data.

        Args:
            model: The model.
            group_sets: Its group sets.
            name_of: The name that stands for what an adaptation does.
        """
        tensors = tensors_of(model)
        names = sorted({part.parameter for s in group_sets for part in chain(s.slices, s.buffers)})
        shapes = {name: list(tensors[name].shape) for name in names}
        return cls._of({"version": VERSION, "shapes": shapes, "sets": [_packed_set(s, name_of) for s in group_sets]})

    @classmethod
    def _of(cls, content: Mapping[str, Any]) -> GroupData:
        return cls(json.dumps(content, sort_keys=True, separators=(",", ":")))

    def digest(self) -> str:
        """SHA-256 of names, kinds, sizes, slices and shapes."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON and for a checkpoint that is read with ``weights_only=True``."""
        return {"format": FORMAT, "digest": self.digest(), **json.loads(self.text)}

    @classmethod
    def from_dict(cls, data: Any) -> GroupData:
        """The inverse of :meth:`to_dict`.

        Raises:
            PlanError: If the data are of an unknown version, malformed, or not what was saved.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT or data.get("version") != VERSION:
            found = (data.get("format"), data.get("version")) if isinstance(data, Mapping) else type(data).__name__
            raise PlanError(
                f"The groups in the plan have format and version {found!r}; expected {FORMAT!r} and {VERSION}."
            )
        groups = cls._of({key: value for key, value in data.items() if key not in ("format", "digest")})
        if groups.digest() != data.get("digest"):
            raise PlanError(
                f"The groups in the plan were changed after they were saved: their digest is {groups.digest()[:12]};"
                f" expected {str(data.get('digest'))[:12]}. Use the plan as it was written; what may be edited is which"
                " groups stay ('kept')."
            )
        return groups

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shapes of the parameters and buffers that the groups hold, by name."""
        return json.loads(self.text)["shapes"]

    def names_fit(self, model: nn.Module) -> bool:
        """Whether the model has parameters and buffers of all the names."""
        return self.shapes.keys() <= tensors_of(model).keys()

    def unpack(self, model: nn.Module, adaptations: Mapping[str, AdaptModule]) -> tuple[GroupSet, ...]:
        """The group sets, for a model that has the shapes that they were found for.

        Sizes of dimensions that no group lies along (the classes of a head) may differ.

        Args:
            model: The model.
            adaptations: What adaptations do, by the names that stand for them.

        Raises:
            PlanError: If the model lacks a parameter, or one has another shape; nothing is expanded before this is known.
                Also if the data are malformed.
        """
        try:
            content = json.loads(self.text)
            shapes, sets = content["shapes"], content["sets"]
            _check_shapes(model, shapes, sets)
            return tuple(_unpacked_set(model, entry, shapes, adaptations) for entry in sets)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise PlanError(f"The groups in the plan are malformed: {type(error).__name__}: {error}.") from error

    def renamed(self, rename: Callable[[str], str]) -> GroupData:
        """The same groups of a model whose modules have other names."""

        def of_tensor(name: str) -> str:
            owner, _, last = name.rpartition(".")
            return f"{rename(owner)}.{last}" if owner else last

        content = json.loads(self.text)
        content["shapes"] = {of_tensor(name): shape for name, shape in content["shapes"].items()}
        for entry in content["sets"]:
            entry["name"] = rename(entry["name"])
            for part in chain(entry["slices"], entry["buffers"]):
                part["parameter"] = of_tensor(part["parameter"])
            for item in chain(entry["attributes"], entry["adaptations"]):
                item["module"] = rename(item["module"])
        return self._of(content)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones under every name that they have."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _packed_set(group_set: GroupSet, name_of: Callable[[Adaptation], str]) -> dict[str, Any]:
    return {
        "name": group_set.name,
        "kind": group_set.kind,
        "layer": group_set.layer,
        "size": group_set.size,
        "minimum": group_set.minimum,
        "block": group_set.block,
        "slices": [_packed_slice(part) for part in group_set.slices],
        "buffers": [_packed_slice(part) for part in group_set.buffers],
        "attributes": [_packed_attribute(a) for a in group_set.attributes],
        "adaptations": [{"module": a.module, "name": name_of(a)} for a in group_set.adaptations],
    }


def _packed_attribute(attribute: Attribute) -> dict[str, Any]:
    packed = {"module": attribute.module, "name": attribute.name, "per_group": attribute.per_group}
    return {**packed, "shared": True} if attribute.shared else packed


def _packed_slice(part: Slice) -> dict[str, Any]:
    packed: dict[str, Any] = {"parameter": part.parameter, "dim": part.dim, "width": part.index.shape[1]}
    by_group, by_column = _to_runs(part.index.flatten()), _to_runs(part.index.T.flatten())
    packed.update({"by_column": by_column} if len(by_column) < len(by_group) else {"by_group": by_group})
    if part.input_dim is not None:
        packed["input_dim"] = part.input_dim
    if part.unobservable_input:
        packed["unobservable"] = True
    if part.only_in_training:
        packed["training"] = True
    return packed


def _unpacked_set(
    model: nn.Module,
    entry: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    adaptations: Mapping[str, AdaptModule],
) -> GroupSet:
    size = entry["size"]
    slices, buffers = (
        tuple(_unpacked_slice(part, size, shapes) for part in entry[key]) for key in ("slices", "buffers")
    )
    return GroupSet(
        name=entry["name"],
        layer=entry["layer"],
        kind=entry["kind"],
        size=size,
        cost=group_cost(model, slices),
        slices=slices,
        attributes=tuple(
            Attribute(a["module"], a["name"], a["per_group"], shared=bool(a.get("shared", False)))
            for a in entry["attributes"]
        ),
        block=entry["block"],
        minimum=entry["minimum"],
        adaptations=tuple(Adaptation(a["module"], adaptations[a["name"]]) for a in entry["adaptations"]),
        buffers=buffers,
    )


def _unpacked_slice(entry: Mapping[str, Any], size: int, shapes: Mapping[str, Sequence[int]]) -> Slice:
    width, name, dim = entry["width"], entry["parameter"], entry["dim"]
    length = shapes[name][dim]
    by_column = "by_column" in entry
    flat = _from_runs(entry["by_column" if by_column else "by_group"], size * width, length)
    index = flat.view(width, size).T.contiguous() if by_column else flat.view(size, width)
    unobservable, only_in_training = (bool(entry.get(key, False)) for key in ("unobservable", "training"))
    return Slice(name, dim, index, entry.get("input_dim"), unobservable, only_in_training)


def _to_runs(positions: Tensor) -> str:
    """Positions as text: ``[0, 1, 2, 8, 10, 12, 5]`` is ``"0-2 8-12/2 5"``."""
    values = positions.numpy().astype(np.int64)
    steps = np.diff(values)
    # where the step is another than the one before
    turns = np.append(np.flatnonzero(np.diff(steps) != 0) + 1, len(steps))
    parts, start = [], 0
    while start < len(values):
        stop = start
        if start < len(steps):
            stop = int(turns[np.searchsorted(turns, start, side="right")]) if start < turns[-1] else len(steps)
        step = int(steps[start]) if stop > start else 1
        if step == 0 or (stop - start < 2 and step != 1):
            stop = start
        first, last = int(values[start]), int(values[stop])
        parts.append(str(first) if stop == start else f"{first}-{last}" + ("" if step == 1 else f"/{step}"))
        start = stop + 1
    return " ".join(parts)


def _from_runs(text: str, count: int, length: int) -> Tensor:
    """The inverse of :func:`_to_runs`.

    Args:
        text: The text.
        count: How many positions it must stand for.
        length: Every position is smaller.

    Raises:
        ValueError: If it does not, or a position comes twice; nothing is expanded before the number of positions is known.
    """
    runs = []
    for part in text.split():
        match = _RUN.fullmatch(part)
        if match is None:
            raise ValueError(f"expected positions like '0-2 8-12/2 5', found {text!r:.80}")
        first, step = int(match[1]), int(match[3] or 1)
        last = first if match[2] is None else int(match[2])
        if step == 0 or (last - first) % step or (last - first) // step < 0 or max(first, last) >= length:
            raise ValueError(f"expected positions below {length}, found {part!r}")
        runs.append(range(first, last + (1 if step > 0 else -1), step))
    found = sum(len(run) for run in runs)
    if found != count or count > length:
        raise ValueError(f"expected {count} different positions below {length}, found {found}")
    flat = torch.tensor(list(chain.from_iterable(runs)), dtype=torch.long)
    if len(flat.unique()) != len(flat):
        raise ValueError(f"expected different positions, found one twice in {text!r:.80}")
    return flat


def _check_shapes(model: nn.Module, shapes: Mapping[str, Sequence[int]], sets: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a model that has other parameters, or other lengths along the dimensions that groups lie along.

    Raises:
        PlanError: Naming a parameter, and both shapes.
    """
    found = tensors_of(model)
    along: dict[str, set[int]] = {}
    for entry in sets:
        if not 0 < entry["size"] <= MOST_GROUPS:
            raise ValueError(f"expected a number of groups, found {entry['size']!r}")
        for part in chain(entry["slices"], entry["buffers"]):
            along.setdefault(part["parameter"], set()).add(part["dim"])
    for name, dims in along.items():
        shape, model_name = tuple(shapes[name]), type(model).__name__
        if name not in found:
            near = ", ".join(list(found)[:3])
            raise PlanError(
                f"The plan does not fit the model: it was made for one with {name!r} of shape {shape}, which this"
                f" {model_name} lacks (it has {near}, ...). Give the module that was pruned, not one around it or in it."
            )
        other = tuple(found[name].shape)
        if len(other) != len(shape) or any(other[dim] != shape[dim] for dim in dims):
            raise PlanError(
                f"The plan does not fit the model: {name!r} has shape {other} in this {model_name}; the plan was made for"
                f" {shape}. Give a dense model, built as the one that was pruned."
            )
