"""The pruning plan: which groups of every group set stay. The one object that crosses every boundary."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from lit_prune._files import read_json, write_text
from lit_prune._renamed import RenamedAttribute
from lit_prune.errors import PlanError, PruningError
from lit_prune.group_data import GroupData
from lit_prune.groups import BLOCK, HIDDEN, GroupSet, is_inside, stack_of
from lit_prune.modeling_pruned import VERSION as CONFIG_VERSION
from lit_prune.modeling_pruned import local_name, to_ranges
from lit_prune.plan_entries import PlanEntry, _integer, _kept, _list, _moved, _renumbered, _text

PLAN_ATTRIBUTE = "_lit_prune_plan"
# what the config of the dense model said of its depth, where blocks left
DEPTH_ATTRIBUTE = "_lit_prune_depth"
FORMAT = "lit_prune.plan"
# version 1 listed every index, and did not say what model the plan is for
VERSION = 2
BEFORE, AFTER = "parameters_before", "parameters_after"
# set on a model whose hidden states were turned
ROTATED_ATTRIBUTE = "_lit_prune_rotated"


@dataclass(frozen=True)
class PruningPlan:
    """The groups to keep in every group set of a model.

    Group sets without an entry are kept whole. Names and indices are those of the model before the cut, even if blocks
    are removed and later ones move up.

    Args:
        entries: One entry for every group set, and every list of blocks, from which something is removed. Sets inside a
            removed block have none.
        biases: Modules that have no bias in the dense model and get one when the plan is applied (see
            :mod:`lit_prune.repair.refit`).
        info: How the plan was made (criterion, ratio, metrics); plain JSON data that nothing depends on.
        sets: Name, kind and size of every group set of the model that the plan is for, by which another model is refused;
            empty if that is not known.
        groups: The group sets themselves, for a model that no description covers: they were found by running it, and the plan
            can be applied without running it again. ``None`` where a description finds them.
        rotated: Whether hidden states were turned (:func:`lit_prune.rotate_hidden`) before channels left: the hidden channels
            of the plan are then directions, which only the weights that were saved with it have.
    """

    entries: tuple[PlanEntry, ...]
    biases: tuple[str, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict, compare=False)
    sets: tuple[tuple[str, str, int], ...] = field(default=(), compare=False)
    groups: GroupData | None = field(default=None, repr=False)
    rotated: bool = False

    def __post_init__(self) -> None:
        """Leave out what leaves with its block."""
        if gone := self.removed_blocks:
            inside = {e.name: any(is_inside(e.name, b) for b in gone) for e in self.entries}
            object.__setattr__(self, "entries", tuple(e for e in self.entries if not inside[e.name]))
            biases = tuple(n for n in self.biases if not any(is_inside(n, b) for b in gone))
            object.__setattr__(self, "biases", biases)

    @property
    def blocks(self) -> tuple[PlanEntry, ...]:
        """The entries for lists of blocks."""
        return tuple(e for e in self.entries if e.kind == BLOCK)

    @property
    def group_entries(self) -> tuple[PlanEntry, ...]:
        """The entries for group sets."""
        return tuple(e for e in self.entries if e.kind != BLOCK)

    @property
    def hidden(self) -> bool:
        """Whether the channels of the hidden states are among the group sets that the plan is for."""
        return any(kind == HIDDEN for kind in (*(e.kind for e in self.entries), *(kind for _, kind, _ in self.sets)))

    @property
    def removed_blocks(self) -> tuple[str, ...]:
        """Names of the removed blocks."""
        return tuple(f"{e.name}.{i}" for e in self.blocks for i in sorted({*range(e.size)} - {*e.kept}))

    @classmethod
    def from_kept(
        cls,
        group_sets: Sequence[GroupSet],
        kept: Sequence[Sequence[int] | np.ndarray],
        info: Mapping[str, Any] | None = None,
    ) -> PruningPlan:
        """Make a plan from the kept group indices of every group set."""
        entries: list[PlanEntry] = []
        stacks: dict[str, dict[int, bool]] = {}
        for group_set, groups in zip(group_sets, kept, strict=True):
            if group_set.kind == BLOCK:
                stack, index = stack_of(group_set.name)
                stacks.setdefault(stack, {})[index] = len(groups) > 0
            elif len(groups) < group_set.size:
                indices = tuple(np.asarray(groups, dtype=np.int64).tolist())
                entries.append(PlanEntry(group_set.name, group_set.kind, group_set.layer, group_set.size, indices))
        for stack, stays in stacks.items():
            if not all(stays.values()):
                entries.append(PlanEntry(stack, BLOCK, 0, len(stays), tuple(i for i in sorted(stays) if stays[i])))
        entries.sort(key=lambda e: (e.layer, e.name))
        sets = tuple((s.name, s.kind, s.size) for s in group_sets if s.kind != BLOCK)
        return cls(tuple(entries), info=dict(info or {}), sets=sets)

    def validate(self, group_sets: Sequence[GroupSet]) -> None:
        """Check that the plan fits a model's group sets.

        Raises:
            PlanError: If it names a set that the model lacks, a size differs, too few groups stay for a module to run, no block
                stays that counts tokens where others do not, or the plan was made for a model with other sets.
        """
        consumers = {part.module for s in group_sets for part in s.slices if part.consumes}
        if strange := [name for name in self.biases if name not in consumers]:
            raise PlanError(
                f"The plan does not fit the model: it adds a bias to {strange[0]!r}, which is no linear layer that reads what"
                " groups give."
            )
        sizes = {s.key: s.size for s in group_sets if s.kind != BLOCK}
        minimum = {s.key: s.minimum for s in group_sets if s.kind != BLOCK}
        equal = {s.key: s.equal_parts for s in group_sets}
        counting: dict[tuple[str, str], set[int]] = {}
        for block in (s for s in group_sets if s.kind == BLOCK):
            stack, index = stack_of(block.name)
            sizes[stack, BLOCK] = sizes.get((stack, BLOCK), 0) + 1
            minimum[stack, BLOCK] = 1
            if block.counts_tokens:
                counting.setdefault((stack, BLOCK), set()).add(index)
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
            if (needed := counting.get(entry.key)) and needed.isdisjoint(entry.kept):
                raise PlanError(
                    f"The plan keeps the blocks {list(entry.kept)} of {entry.name!r}, and none of {sorted(needed)}: expected one"
                    " of these or more, because only their part of the key/value cache says how many tokens there are so far."
                )
            if (parts := equal.get(entry.key, 1)) > 1:
                counts = np.bincount(np.asarray(entry.kept, dtype=np.int64) // (entry.size // parts), minlength=parts)
                if len(set(counts.tolist())) > 1:
                    raise PlanError(
                        f"The plan keeps {counts.tolist()} groups in the {parts} parts of {entry.name!r} ({entry.kind});"
                        f" expected as many in each, because the {entry.size // parts} groups of a part share weights."
                    )
        wanted = {(name, kind): size for name, kind, size in self.sets}
        # a plan may have been made for the sets of some kinds alone
        kinds = {kind for _, kind in wanted}
        found = {key: size for key, size in sizes.items() if key[1] in kinds}
        for name, kind in sorted(wanted.keys() | found.keys()) if wanted else ():
            if wanted.get((name, kind)) != found.get((name, kind)):
                raise PlanError(
                    f"The plan was made for another model: one with {wanted.get((name, kind), 0)} groups at {name!r} ({kind})"
                    f" and {len(wanted)} group sets in all; this one has {found.get((name, kind), 0)} there and {len(found)} in"
                    " all."
                )

    def check_rotation(self, model: nn.Module) -> None:
        """Refuse a model whose hidden states were not turned, if the plan is of turned ones (``rotated``).

        Raises:
            PlanError: If that is so.
        """
        if self.rotated and not any(getattr(m, ROTATED_ATTRIBUTE, False) for m in model.modules()):
            raise PlanError(
                "The plan was made once hidden states were turned (rotate_hidden), so that its hidden channels are none of"
                f" this {type(model).__name__}. Load the weights that were saved with it, by lit_prune.load_pruned or from"
                " the checkpoint."
            )

    then = RenamedAttribute("compose")
    afterwards = RenamedAttribute("entries_after")

    def compose(self, later: PruningPlan) -> PruningPlan:
        """Compose with a plan made for the model that this one results in, into one plan for the original model.

        What it says of how it came about is that of the later one, but for the parameters before.

        Raises:
            PlanError: If the later plan does not fit what this one leaves.
        """
        first = {e.key: e for e in self.entries}
        second = {e.key: e for e in (_renumbered(e, self._original_blocks) for e in later.entries)}
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
            kept = np.asarray(before.kept, dtype=np.int64)[list(after.kept)]
            entries.append(replace(before, kept=tuple(kept.tolist())))
        entries.sort(key=lambda e: (e.layer, e.name))
        biases = tuple(sorted({*self.biases, *(self.original_name(b) for b in later.biases)}))
        info = {**self.info, **later.info}
        for name, owner in ((BEFORE, self.info), (AFTER, later.info)):
            info.pop(name, None)
            if name in owner:
                info[name] = owner[name]
        return PruningPlan(tuple(entries), biases, info, self.sets, self.groups, self.rotated or later.rotated)

    def counted(self, before: int | None, after: int) -> PruningPlan:
        """The same plan with the parameter counts before (if known) and after it is applied in its ``info``."""
        counts = {AFTER: after} if before is None else {BEFORE: before, AFTER: after}
        return replace(self, info={**self.info, **counts})

    def original(self, group_set: GroupSet) -> GroupSet:
        """A group set of the model that this plan results in, by the names and layer that everything had before."""
        name, layer = _moved(group_set.name, group_set.layer, self._original_blocks)
        slices = tuple(replace(s, parameter=self.original_name(s.parameter)) for s in group_set.slices)
        return replace(group_set, name=name, layer=layer, block=self.original_name(group_set.block), slices=slices)

    def original_name(self, name: str) -> str:
        """The name that a module or parameter of the model this plan results in had before."""
        return _moved(name, 0, self._original_blocks)[0]

    @cached_property
    def _original_blocks(self) -> dict[str, dict[int, int]]:
        return {e.name: dict(enumerate(e.kept)) for e in self.blocks}

    def entries_after(self) -> dict[tuple[str, str], PlanEntry]:
        """The group-set entries by name and kind that the sets have in the pruned model."""
        moved = {e.name: {old: new for new, old in enumerate(e.kept)} for e in self.blocks}
        return {e.key: e for e in (_renumbered(e, moved) for e in self.group_entries)}

    def renamed(self, rename: Callable[[str], str]) -> PruningPlan:
        """The same plan for a model whose modules have other names."""
        entries = tuple(replace(e, name=rename(e.name)) for e in self.entries)
        sets = tuple((rename(name), kind, size) for name, kind, size in self.sets)
        groups = None if self.groups is None else self.groups.renamed(rename)
        return replace(self, entries=entries, biases=tuple(rename(b) for b in self.biases), sets=sets, groups=groups)

    def digest(self) -> str:
        """SHA-256 of what the plan cuts, the same on every rank and machine, and for every version of the file."""
        groups = [
            {"name": e.name, "kind": e.kind, "layer": e.layer, "size": e.size, "kept": list(e.kept)}
            for e in self.entries
        ]
        content = {"format": FORMAT, "version": 1, "group_sets": groups, "biases": list(self.biases)}
        if self.groups is not None:
            content["groups"] = self.groups.digest()
        if self.rotated:
            content["rotated"] = True
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON and for a checkpoint that is read with ``weights_only=True``."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "group_sets": [
                {"name": e.name, "kind": e.kind, "layer": e.layer, "size": e.size, "kept": to_ranges(e.kept)}
                for e in self.entries
            ],
            "biases": list(self.biases),
            "model": [list(group_set) for group_set in self.sets],
            "info": json.loads(json.dumps(dict(self.info))),
            **({} if self.groups is None else {"groups": self.groups.to_dict()}),
            **({"rotated": True} if self.rotated else {}),
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
        if data.get("version") not in (1, VERSION):
            raise PlanError(
                f"The plan has version {data.get('version')!r}; this lit_prune reads versions 1 and {VERSION}."
            )
        try:
            entries = tuple(
                PlanEntry(
                    _text(e["name"]),
                    _text(e["kind"]),
                    _integer(e["layer"]),
                    _integer(e["size"]),
                    _kept(e["kept"], e["size"]),
                )
                for e in _list(data["group_sets"])
            )
            biases = tuple(_text(b) for b in _list(data.get("biases", ())))
            sets = tuple((_text(n), _text(kind), _integer(size)) for n, kind, size in _list(data.get("model", ())))
            if not isinstance(info := data.get("info", {}), Mapping):
                raise TypeError(f"expected a mapping of info, found {info!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"The plan is malformed: {type(error).__name__}: {error}.") from error
        if len({e.key for e in entries}) != len(entries):
            raise PlanError("The plan names a group set twice.")
        groups = GroupData.from_dict(data["groups"]) if data.get("groups") is not None else None
        if not isinstance(rotated := data.get("rotated", False), bool):
            raise PlanError(f"The plan is malformed: expected true or false for rotated, found {rotated!r}.")
        return cls(entries, biases, dict(info), sets, groups, rotated)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, one line a group set."""
        content = self.to_dict()
        groups = content.pop("groups", None)
        lists = [] if groups is None else [f' "groups": {json.dumps(groups)}']
        for name in ("group_sets", "model"):
            lines = ",\n  ".join(json.dumps(entry) for entry in content.pop(name))
            lists.append(f' "{name}": [\n  {lines}\n ]')
        rest = json.dumps(content, indent=1).removesuffix("\n}")
        write_text(path, ",\n".join((rest, *lists)) + "\n}\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Read a plan from a JSON file.

        Raises:
            FileNotFoundError: If there is no such file.
            PlanError: If it is a folder, or not a valid plan.
        """
        try:
            data = read_json(path)
        except PruningError as error:
            raise PlanError(f"{path} is not a pruning plan: {error}") from error
        try:
            return cls.from_dict(data)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error


def get_plan(model: nn.Module) -> PruningPlan | None:
    """The plan, relative to the dense model, of everything that was cut from the model; ``None`` if it is dense.

    Raises:
        PlanError: If the model was loaded from files whose plan was changed after they were saved.
    """
    if not hasattr(model, PLAN_ATTRIBUTE) and (plan := plan_from_config(getattr(model, "config", None))) is not None:
        set_plan(model, plan.renamed(lambda name: local_name(model, name)))
    return getattr(model, PLAN_ATTRIBUTE, None)


def set_plan(model: nn.Module, plan: PruningPlan | None) -> None:
    """Note on a model what was cut from it so far, whatever its config says; ``None`` if nothing was."""
    setattr(model, PLAN_ATTRIBUTE, plan)


def plan_from_config(config: Any) -> PruningPlan | None:
    """The plan that a loaded config carries, ``None`` if it carries none.

    Raises:
        PlanError: If it is not the plan that was saved.
    """
    pruning = getattr(config, "pruning", None)
    if not isinstance(pruning, Mapping):
        return None
    if pruning.get("version") != CONFIG_VERSION or not isinstance(pruning.get("digest"), str):
        raise PlanError(
            f"The pruning entry of config.json has version {pruning.get('version')!r}; expected {CONFIG_VERSION}."
            if "digest" in pruning
            else "The pruning entry of config.json has no digest."
        )
    try:
        groups = [
            {**{key: g[key] for key in ("name", "kind", "layer", "size")}, "kept": g["kept"]} for g in pruning["groups"]
        ]
        content = {"biases": pruning["biases"], "info": pruning.get("info", {}), "group_sets": groups}
        content["rotated"] = pruning.get("rotated", False)
    except (KeyError, TypeError) as error:
        raise PlanError(f"The plan in config.json is malformed: {type(error).__name__}: {error}.") from error
    plan = PruningPlan.from_dict({"format": FORMAT, "version": VERSION, **content})
    if plan.digest() != pruning["digest"]:
        raise PlanError(
            f"The plan in config.json was changed after it was saved: its digest is {plan.digest()[:12]}; expected"
            f" {str(pruning['digest'])[:12]}."
        )
    return plan
