"""Applies a plan to a model and to its optimizers: smaller parameters, sliced optimizer state, consistent attributes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_prune import references, sharding
from lit_prune.architectures import find_group_sets, find_model
from lit_prune.architectures.base import depth_of
from lit_prune.config_view import override_config
from lit_prune.cuts import DimensionCut, cut_tensor, paste_tensor, set_data
from lit_prune.errors import PlanError, PruningError
from lit_prune.groups import BLOCK, GroupSet, check_names
from lit_prune.modeling_pruned import change_config, keep_blocks, of_kept_blocks, sync_features
from lit_prune.optimizer_groups import add_bias, remove_from_groups, rename_in_groups
from lit_prune.optimizer_search import check_new_parameters, check_ownership, find_optimizers
from lit_prune.optimizer_state import StateCutter, check_state, reset_histories
from lit_prune.plan import DEPTH_ATTRIBUTE, PLAN_ATTRIBUTE, PlanEntry, PruningPlan, get_plan
from lit_prune.sharded_surgery import cut_sharded


def parameter_cuts(
    model: nn.Module, plan: PruningPlan, group_sets: Sequence[GroupSet]
) -> dict[str, list[DimensionCut]]:
    """What a plan means for every parameter that it touches.

    Args:
        model: The model.
        plan: A plan that fits the model.
        group_sets: The model's group sets.

    Returns:
        By parameter name, one cut for every dimension that loses something.

    Raises:
        PlanError: If the plan does not fit.
    """
    check_names(model, group_sets)
    plan.validate(group_sets)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    by_key = {s.key: s for s in group_sets}
    masks: dict[tuple[str, int], Tensor] = {}
    for entry in plan.group_entries:
        group_set = by_key[entry.key]
        removed = group_set.kept_to_removed(entry.kept)
        for part in group_set.slices:
            length = parameters[part.parameter].shape[part.dim]
            mask = masks.setdefault((part.parameter, part.dim), torch.ones(length, dtype=torch.bool))
            mask[part.index[removed].flatten()] = False
    cuts: dict[str, list[DimensionCut]] = {}
    for (name, dim), mask in masks.items():
        cuts.setdefault(name, []).append(DimensionCut(dim, mask.nonzero().flatten(), (~mask).nonzero().flatten()))
    return cuts


def touched_parameters(
    model: nn.Module, group_sets: Iterable[GroupSet], kinds: Collection[str] | None = None
) -> dict[str, set[int]]:
    """What any plan may cut, before there is one.

    Args:
        model: The model.
        group_sets: Its group sets.
        kinds: The kinds of groups that may be removed; ``None`` for all.

    Returns:
        By parameter name, the dimensions along which the parameter may become smaller. Whole blocks are not among them:
        their parameters are removed as they are.
    """
    touched: dict[str, set[int]] = {}
    for group_set in group_sets:
        if group_set.kind != BLOCK and (kinds is None or group_set.kind in kinds):
            for part in group_set.slices:
                touched.setdefault(part.parameter, set()).add(part.dim)
    return touched


def check_holders(
    model: nn.Module,
    root: nn.Module,
    optimizers: Sequence[Any],
    touched: Mapping[str, Collection[int]],
    *,
    adds_biases: bool = False,
) -> list[Any]:
    """Refuse whatever holds parameters, or tensors of their sizes, and cannot follow a cut.

    Args:
        model: The model.
        root: The module that holds it.
        optimizers: The optimizers that are to be cut along.
        touched: By parameter name, the dimensions that may become smaller; see :func:`touched_parameters`.
        adds_biases: Whether the plan may give linear layers biases.

    Returns:
        All optimizers that can be reached from those given, the modules and the hooks of parameters.

    Raises:
        OptimizerStateError: If an optimizer is of another model, or has state that cannot be cut.
        ReferenceHeldError: If a hook, a module beside the model or a copy by hand holds tensors of the old sizes.
        TypeError: If something given is not an optimizer.
    """
    check_ownership(optimizers, root)
    found = find_optimizers(optimizers, root)
    references.check_ties(root, model, touched)
    references.check_hooks(model, touched)
    references.check_copies(root, model, touched)
    check_state(model, found, touched)
    if adds_biases:
        check_new_parameters(model, optimizers, found)
    return found


def apply_plan(
    model: nn.Module,
    plan: PruningPlan,
    optimizers: Iterable[Optimizer] = (),
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Cut the model for real.

    Every parameter stays the object that it is and becomes smaller, one at a time, so that hooks, lists of parameters and
    optimizers follow. Of the old values only what is removed is kept until the end, so that an error anywhere puts model
    and optimizers back as they were, without a second copy of the model.
    Parameters that FSDP2 shards are gathered, cut and sharded again one at a time, and so is their optimizer state; new
    objects take their place. All processes have to call this. What is removed is kept as shards until the end, so that an
    error which all processes meet is undone, too; after an error of one alone (out of memory, a broken connection) the
    others wait for it in vain.
    The state of the optimizers, and of those that they wrap, is cut likewise. State that mirrors weights (slow weights,
    averages) moves along with weights that a repair changes. Gradients are dropped. Module attributes follow the new sizes.

    Blocks that are removed are taken out of their list; those behind them move up, also in the cache of keys and values. The
    model gets a config of its own that says how many there are now, and their parameters are taken out of the optimizers.

    Args:
        model: The model, or a module that holds one; changed in place.
        plan: A plan that fits it.
        optimizers: Optimizers over its parameters; changed in place.
        weights: New values, in the shape after the cut, for some parameters (from :mod:`lit_prune.repair`); biases that
            the plan adds among them.

    Raises:
        PlanError: If the plan or ``weights`` do not fit the model.
        OptimizerStateError: If an optimizer's state cannot be cut, or the optimizer is of another model.
        ReferenceHeldError: If something else holds tensors of the old sizes.
    """
    cut(model, plan, optimizers, weights)


@torch.no_grad()
def cut(
    model: nn.Module,
    plan: PruningPlan,
    optimizers: Iterable[Any] = (),
    weights: Mapping[str, Tensor] | None = None,
    *,
    root: nn.Module | None = None,
) -> Callable[[], None]:
    """Do what :func:`apply_plan` does, and return a function that undoes it; that holds on to everything that was removed.

    Args:
        model: The model, or a module that holds one.
        plan: A plan that fits it.
        optimizers: Optimizers over its parameters.
        weights: New values for some parameters.
        root: The module that holds the model, and what else may hold parameters of it; ``model`` if ``None``.
    """
    root = model if root is None else root
    model = find_model(model)[1]
    group_sets = find_group_sets(model, blocks=bool(plan.blocks))
    cuts = parameter_cuts(model, plan, group_sets)
    weights = dict(weights or {})
    previous = get_plan(model)
    composed = plan if previous is None else previous.then(plan)
    _check_weights(model, cuts, weights, plan)
    touched = {name: {c.dim for c in of_one} for name, of_one in cuts.items()}
    found = check_holders(model, root, list(optimizers), touched, adds_biases=bool(plan.biases))
    if sharding.any_sharded(model.parameters()) is not None:
        sharding.reshard(model)
        sharding.check_layout(model, group_sets)
        if plan.biases:
            raise PruningError(
                f"The plan adds biases ({plan.biases[0]!r}, ...), which FSDP2 cannot take up in a model that it shards"
                " already. Use repair='least_squares' or repair=None."
            )
    journal: list[Callable[[], None]] = []
    places = _places(model)

    def undo() -> None:
        with torch.no_grad():
            for step in reversed(journal):
                step()

    try:
        names = [*cuts, *(n for n in weights if n not in cuts and not _is_added(n, plan))]
        changed = {id(model.get_parameter(name)) for name in names}
        reset_histories(found, changed | _leaving(model, plan), journal)
        cutter = StateCutter(found, journal)
        cutter.find_mirrors([model.get_parameter(name) for name in names if name in weights])
        for name in names:
            _shrink_parameter(model, name, places, cuts.get(name, []), weights.get(name), cutter, journal)
        for module in plan.biases:
            _add_bias(model, module, weights.get(f"{module}.bias"), cutter, journal)
        _set_attributes(model, group_sets, plan, journal)
        for entry in plan.blocks:
            _remove_blocks(model, entry, cutter, journal)
        _set_attribute(model, PLAN_ATTRIBUTE, composed, journal)
    except BaseException:
        undo()
        raise
    return undo


def _check_weights(
    model: nn.Module,
    cuts: Mapping[str, Sequence[DimensionCut]],
    weights: Mapping[str, Tensor],
    plan: PruningPlan,
) -> None:
    """Refuse new weights for what the model does not have, or of other shapes."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unknown = set(weights) - parameters.keys() - {f"{module}.bias" for module in plan.biases}
    if unknown:
        raise PlanError(f"New weights were given for {sorted(unknown)[:3]}, which the model does not have.")
    for name, values in weights.items():
        if name in parameters:
            shape = list(parameters[name].shape)
            for cut in cuts.get(name, ()):
                shape[cut.dim] = len(cut.kept)
            if list(values.shape) != shape:
                raise PlanError(f"New weights for {name!r} have shape {tuple(values.shape)}; expected {tuple(shape)}.")


def _leaving(model: nn.Module, plan: PruningPlan) -> set[int]:
    """Ids of the parameters of blocks that a plan removes."""
    return {id(p) for name in plan.removed_blocks for p in model.get_submodule(name).parameters()}


@torch.no_grad()
def cut_block(
    block: nn.Module,
    name: str,
    plan: PruningPlan,
    group_sets: Sequence[GroupSet],
    cuts: Mapping[str, Sequence[DimensionCut]],
) -> None:
    """Cut one block on its own, a copy of a decoder layer for instance, as a plan cuts it within its model.

    Args:
        block: The block; changed in place.
        name: Its qualified name within the model.
        plan: The plan for the model.
        group_sets: The model's group sets.
        cuts: The plan's cuts by parameter name, see :func:`parameter_cuts`.
    """
    prefix = f"{name}."
    journal: list[Callable[[], None]] = []
    places = _places(block)
    for parameter, parameter_cuts in cuts.items():
        if parameter.startswith(prefix):
            short = parameter.removeprefix(prefix)
            _shrink_parameter(block, short, places, parameter_cuts, None, StateCutter((), journal), journal)
    _set_attributes(block, [s for s in group_sets if s.block == name], plan, journal, prefix)


def _set_attributes(
    root: nn.Module,
    group_sets: Sequence[GroupSet],
    plan: PruningPlan,
    journal: list[Callable[[], None]],
    prefix: str = "",
) -> None:
    entries = {e.key: e for e in plan.entries}
    for group_set in group_sets:
        if group_set.key in entries:
            kept = entries[group_set.key].kept
            for attribute in group_set.attributes:
                module = root.get_submodule(attribute.module.removeprefix(prefix))
                _set_attribute(module, attribute.name, attribute.per_group * len(kept), journal)
            for adaptation in (a for a in group_set.adaptations if a.module.startswith(prefix)):
                module = root.get_submodule(adaptation.module.removeprefix(prefix))
                journal.append(adaptation.apply(module, torch.tensor(kept, dtype=torch.long)))


def _remove_blocks(model: nn.Module, entry: PlanEntry, cutter: StateCutter, journal: list[Callable[[], None]]) -> None:
    """Take blocks out of their list, out of the optimizers, and out of what the model says of its depth."""
    blocks: Any = model.get_submodule(entry.name)
    gone = [blocks[i] for i in set(range(entry.size)) - set(entry.kept)]
    parameters = [p for block in gone for p in block.parameters()]
    remove_from_groups(cutter.optimizers, parameters, journal)
    cutter.drop(parameters)
    journal.extend(sharding.release(block) for block in gone)
    before = dict(blocks.named_children())
    journal.append(keep_blocks(blocks, entry.kept))
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
            field = config.attribute_map.get(name.removeprefix("config."), name.removeprefix("config."))
            fields[field] = getattr(config, field)
    return fields


def _counts_blocks(value: Any, entry: PlanEntry) -> bool:
    return value == entry.size or (isinstance(value, (list, tuple)) and len(value) == entry.size)


def _is_added(name: str, plan: PruningPlan) -> bool:
    return name.removesuffix(".bias") in plan.biases


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """By the id of every parameter, the modules that hold it and the name that they hold it by."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            places.setdefault(id(parameter), []).append((module, key))
    return places


def _shrink_parameter(
    model: nn.Module,
    name: str,
    places: Mapping[int, Sequence[tuple[nn.Module, str]]],
    cuts: Sequence[DimensionCut],
    values: Tensor | None,
    cutter: StateCutter,
    journal: list[Callable[[], None]],
) -> None:
    """Make a parameter, and what optimizers remember of it, smaller; the parameter stays the object that it is."""
    parameter = model.get_parameter(name)
    owners = places[id(parameter)]
    if isinstance(parameter, DTensor):
        cut_sharded(model, parameter, owners, cuts, values, cutter, journal)
        return
    shape, gradient, requires_grad = parameter.shape, parameter.grad, parameter.requires_grad
    stayed, removed = cut_tensor(parameter.data, cuts)
    data = stayed
    if values is not None:
        data = values.to(dtype=stayed.dtype, device=stayed.device, copy=True).contiguous()

    def undo() -> None:
        set_data(parameter, paste_tensor(stayed, cuts, removed) if cuts else stayed)
        parameter.requires_grad_(requires_grad)
        parameter.grad = gradient
        for module, _ in owners:
            sync_features(module)

    journal.append(undo)
    parameter.grad = None
    # a layer that lost everything has no gradient to wait for, and DDP would wait
    parameter.requires_grad_(requires_grad and data.numel() > 0)
    set_data(parameter, data)
    for module, _ in owners:
        sync_features(module)
    cutter.cut(parameter, shape, cuts, None if values is None else data - stayed)


def _add_bias(
    model: nn.Module,
    name: str,
    values: Tensor | None,
    cutter: StateCutter,
    journal: list[Callable[[], None]],
) -> None:
    """Give a linear layer a bias, also in the optimizers' parameter groups."""
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear) or module.bias is not None:
        raise PlanError(
            f"The plan adds a bias to {name!r}, which is a {type(module).__name__} that has one or takes none."
        )
    data = torch.zeros(module.out_features, dtype=module.weight.dtype, device=module.weight.device)
    if values is not None:
        data.copy_(values)
    bias = nn.Parameter(data, requires_grad=module.weight.requires_grad)

    def undo() -> None:
        module.bias = None

    journal.append(undo)
    module.bias = bias
    add_bias(cutter.optimizers, model, name, journal)
    cutter.add(bias, like=module.weight)


def _set_attribute(module: nn.Module, name: str, value: Any, journal: list[Callable[[], None]]) -> None:
    if name.startswith("config."):
        journal.append(override_config(module, name.removeprefix("config."), value))
        return
    missing = object()
    before = getattr(module, name, missing)

    def undo() -> None:
        if before is missing:
            delattr(module, name)
        else:
            setattr(module, name, before)

    journal.append(undo)
    setattr(module, name, value)
