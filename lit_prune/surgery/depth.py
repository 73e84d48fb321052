"""Removal of whole decoder layers, and what a model says of its depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lit_prune.architectures.config_view import override_config
from lit_prune.architectures.registry import depth_of
from lit_prune.distributed import shards
from lit_prune.modeling_pruned import change_config, keep_blocks, of_kept_blocks
from lit_prune.plan import DEPTH_ATTRIBUTE, PlanEntry, PruningPlan
from lit_prune.surgery.optimizer_groups import remove_from_groups, rename_in_groups
from lit_prune.surgery.optimizer_state import StateCutter
from lit_prune.surgery.tensors import move_to_cpu


def _leaving(model: nn.Module, plan: PruningPlan) -> set[int]:
    """Ids of the parameters of blocks that a plan removes."""
    return {id(p) for name in plan.removed_blocks for p in model.get_submodule(name).parameters()}


def _remove_blocks(model: nn.Module, entry: PlanEntry, cutter: StateCutter, journal: list[Callable[[], None]]) -> None:
    """Take blocks out of their list, out of the optimizers, and out of what the model says of its depth."""
    blocks: Any = model.get_submodule(entry.name)
    gone = [blocks[i] for i in set(range(entry.size)) - set(entry.kept)]
    parameters = [p for block in gone for p in block.parameters()]
    remove_from_groups(cutter.optimizers, parameters, journal)
    cutter.drop(parameters)
    journal.extend(shards.release(block) for block in gone)
    before = dict(blocks.named_children())
    journal.append(keep_blocks(blocks, entry.kept))
    stay = {id(parameter) for parameter in model.parameters()}
    journal.append(move_to_cpu(p for p in parameters if id(p) not in stay))
    new_names = {
        id(parameter): (f"{entry.name}.{old}.{name}", f"{entry.name}.{new}.{name}")
        for new, old in enumerate(entry.kept)
        for name, parameter in before[str(old)].named_parameters()
    }
    rename_in_groups(cutter.optimizers, new_names, journal)
    holder = model.get_submodule(entry.name.rpartition(".")[0])
    for name in depth_of(model) or ():
        value = None if name.startswith("config.") else getattr(holder, name, None)
        if _counts_blocks(value, entry):
            _set_attribute(holder, name, of_kept_blocks(value, entry.kept), journal)
    if fields := depth_fields(model, entry):
        journal.append(change_config(model, {n: of_kept_blocks(v, entry.kept) for n, v in fields.items()}))
        _set_attribute(model, DEPTH_ATTRIBUTE, {**fields, **getattr(model, DEPTH_ATTRIBUTE, {})}, journal)


def depth_fields(model: nn.Module, entry: PlanEntry) -> dict[str, Any]:
    """The fields of a model's config that say how many blocks there are, or something for each of them.

    Args:
        model: The model, before blocks leave.
        entry: What the plan says of its blocks.

    Returns:
        Their values by name.
    """
    config: Any = getattr(model, "config", None)
    fields = {}
    for name in depth_of(model) or ():
        if name.startswith("config.") and _counts_blocks(getattr(config, name.removeprefix("config."), None), entry):
            # transformers' configs may hold a field by another name
            known = getattr(config, "attribute_map", {})
            field = known.get(name.removeprefix("config."), name.removeprefix("config."))
            fields[field] = getattr(config, field)
    return fields


def _counts_blocks(value: Any, entry: PlanEntry) -> bool:
    return value == entry.size or (isinstance(value, (list, tuple)) and len(value) == entry.size)


def _set_attribute(module: nn.Module, name: str, value: Any, journal: list[Callable[[], None]]) -> None:
    if name.startswith("config."):
        journal.append(override_config(module, name.removeprefix("config."), value))
        return
    missing = object()
    before = getattr(module, name, missing)

    def undo() -> None:
        if before is missing:
            vars(module).pop(name, None)
        else:
            setattr(module, name, before)

    journal.append(undo)
    setattr(module, name, value)
