"""The pruning plan: which groups of every group set stay. The one object that crosses every boundary."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lit_prune.errors import PlanError
from lit_prune.files import write_text
from lit_prune.groups import GroupSet

PLAN_ATTRIBUTE = "_lit_prune_plan"
FORMAT = "lit_prune.plan"
VERSION = 1


@dataclass(frozen=True)
class PlanEntry:
    """What stays of one group set.

    Args:
        name: Name of the group set.
        kind: Its kind.
        layer: Its layer.
        size: Number of groups it has in the model that the plan is for.
        kept: Indices of the groups that stay, ascending.
    """

    name: str
    kind: str
    layer: int
    size: int
    kept: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the indices.

        Raises:
            PlanError: If they are not ascending, distinct and within the set.
        """
        ascending = all(a < b for a, b in zip(self.kept, self.kept[1:], strict=False))
        if not ascending or (self.kept and not 0 <= self.kept[0] <= self.kept[-1] < self.size):
            raise PlanError(
                f"The kept groups of {self.name!r} ({self.kind}) must be ascending and within 0..{self.size - 1}; found"
                f" {list(self.kept[:10])}{'...' if len(self.kept) > 10 else ''}."
            )

    @property
    def key(self) -> tuple[str, str]:
        """Name and kind."""
        return self.name, self.kind


@dataclass(frozen=True)
class PruningPlan:
    """Which groups stay in every group set of a model.

    Group sets that the plan does not name stay whole.

    Args:
        entries: One for every group set that loses something.
        biases: Modules that have no bias in the dense model and get one when the plan is applied (see
            :mod:`lit_prune.repair`).
        info: How the plan came about (criterion, ratio, figures); plain JSON data that nothing depends on.
    """

    entries: tuple[PlanEntry, ...]
    biases: tuple[str, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def from_kept(
        cls, group_sets: Sequence[GroupSet], kept: Sequence[Sequence[int]], info: Mapping[str, Any] | None = None
    ) -> PruningPlan:
        """Make a plan from the kept group indices of every group set."""
        entries = tuple(
            PlanEntry(s.name, s.kind, s.layer, s.size, tuple(int(i) for i in k))
            for s, k in zip(group_sets, kept, strict=True)
            if len(k) < s.size
        )
        return cls(entries, info=dict(info or {}))

    def validate(self, group_sets: Sequence[GroupSet]) -> None:
        """Check that the plan fits a model's group sets.

        Raises:
            PlanError: If it names a set that the model lacks, a size differs, or too few groups stay for a module to run.
        """
        sizes = {s.key: s.size for s in group_sets}
        minimum = {s.key: s.minimum for s in group_sets}
        for entry in self.entries:
            if entry.key not in sizes:
                near = sorted(name for name, kind in sizes if kind == entry.kind)[:3]
                raise PlanError(
                    f"The plan does not fit the model: it names {entry.name!r} ({entry.kind}), and the model has group sets"
                    f" like {near}."
                )
            if sizes[entry.key] != entry.size:
                raise PlanError(
                    f"The plan does not fit the model: {entry.name!r} ({entry.kind}) has {sizes[entry.key]} groups, the plan"
                    f" was made for {entry.size}."
                )
            if len(entry.kept) < minimum[entry.key]:
                raise PlanError(
                    f"The plan keeps {len(entry.kept)} of the {entry.size} groups of {entry.name!r} ({entry.kind}), which"
                    f" runs with {minimum[entry.key]} or more."
                )

    def then(self, later: PruningPlan) -> PruningPlan:
        """Compose with a plan made for the model that this one results in, into one plan for the original model.

        Raises:
            PlanError: If the later plan does not fit what this one leaves.
        """
        first = {e.key: e for e in self.entries}
        second = {e.key: e for e in later.entries}
        entries = []
        for key in (*first, *(k for k in second if k not in first)):
            if key not in second or key not in first:
                entries.append(first.get(key) or second[key])
                continue
            before, after = first[key], second[key]
            if after.size != len(before.kept):
                raise PlanError(
                    f"The plans do not compose: {key[0]!r} ({key[1]}) keeps {len(before.kept)} groups in the first plan, and"
                    f" the second was made for {after.size}."
                )
            entries.append(
                PlanEntry(
                    before.name, before.kind, before.layer, before.size, tuple(before.kept[i] for i in after.kept)
                )
            )
        entries.sort(key=lambda e: (e.layer, e.name))
        biases = tuple(sorted({*self.biases, *later.biases}))
        return PruningPlan(tuple(entries), biases, {**self.info, **later.info})

    def digest(self) -> str:
        """SHA-256 of what the plan cuts, the same on every rank and machine."""
        content = self.to_dict()
        del content["info"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON and for a checkpoint that is read with ``weights_only=True``."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "group_sets": [
                {"name": e.name, "kind": e.kind, "layer": e.layer, "size": e.size, "kept": list(e.kept)}
                for e in self.entries
            ],
            "biases": list(self.biases),
            "info": json.loads(json.dumps(dict(self.info))),
        }

    @classmethod
    def from_dict(cls, data: Any) -> PruningPlan:
        """The inverse of :meth:`to_dict`.

        Raises:
            PlanError: If the data are not a plan of a known version.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise PlanError(f"Not a pruning plan: expected a mapping with format {FORMAT!r}; found {found!r}.")
        if data.get("version") != VERSION:
            raise PlanError(f"The plan has version {data.get('version')!r}; this lit_prune reads version {VERSION}.")
        try:
            entries = tuple(
                PlanEntry(
                    _text(e["name"]),
                    _text(e["kind"]),
                    _integer(e["layer"]),
                    _integer(e["size"]),
                    tuple(_integer(i) for i in e["kept"]),
                )
                for e in data["group_sets"]
            )
            biases = tuple(_text(b) for b in data.get("biases", ()))
            info = dict(data.get("info", {}))
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"The plan is malformed: {type(error).__name__}: {error}.") from error
        if len({e.key for e in entries}) != len(entries):
            raise PlanError("The plan names a group set twice.")
        return cls(entries, biases, info)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Read a plan from a JSON file.

        Raises:
            PlanError: If the file is not a valid plan.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise PlanError(f"{path} is not a pruning plan: {error}.") from error
        return cls.from_dict(data)


def get_plan(model: nn.Module) -> PruningPlan | None:
    """The plan, relative to the dense model, of everything that was cut from the model; ``None`` if it is dense."""
    return getattr(model, PLAN_ATTRIBUTE, None)


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected an integer, found {value!r}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {value!r}")
    return value
