"""Applies a plan to a model and to its optimizers: smaller parameters, sliced optimizer state, consistent attributes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_prune.architectures.caches import set_caches_aside
from lit_prune.architectures.features import is_convolution, output_dim
from lit_prune.architectures.module_sizes import sync_sizes
from lit_prune.architectures.plain_modules import TRANSPOSED
from lit_prune.distributed import shards
from lit_prune.errors import PlanError, PruningError
from lit_prune.groups import GroupSet, count_parameters
from lit_prune.plan import BEFORE, PLAN_ATTRIBUTE, ROTATED_ATTRIBUTE, PruningPlan, get_plan, set_plan
from lit_prune.surgery import references
from lit_prune.surgery.compiled import forget_compiled
from lit_prune.surgery.depth import _leaving, _remove_blocks, _set_attribute
from lit_prune.surgery.kept_groups import groups_after_cut, model_and_group_sets, with_kept_groups
from lit_prune.surgery.optimizer_groups import add_bias
from lit_prune.surgery.optimizer_search import check_new_parameters, check_ownership, find_optimizers
from lit_prune.surgery.optimizer_state import StateCutter, check_repairable, check_state, reset_histories
from lit_prune.surgery.plan_cuts import buffer_cuts, parameter_cuts
from lit_prune.surgery.saving import save_with_plan
from lit_prune.surgery.sharded import cut_sharded
from lit_prune.surgery.tensors import DimensionCut, UndoCut, cut_tensor, set_data
from lit_prune.surgery.undoing import module_state, undo_all
from lit_prune.surgery.untying import untie_head
from lit_prune.surgery.width import narrow_config
from lit_prune.torch_internals import tables


def check_holders(
    model: nn.Module,
    root: nn.Module,
    optimizers: Sequence[Any],
    touched: Mapping[str, Collection[int]],
    *,
    adds_biases: bool = False,
    repaired: Iterable[str] = (),
) -> list[Any]:
    """Refuse whatever holds parameters, or tensors of their sizes, and cannot follow a cut.

    Args:
        model: The model.
        root: The module that holds it.
        optimizers: The optimizers whose state is to be pruned, too.
        touched: By parameter name, the dimensions that may become smaller; see :func:`touched_parameters`.
        adds_biases: Whether the plan may give linear layers biases.
        repaired: Names of the parameters that may get new weights.

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
    check_repairable(found, [model.get_parameter(name) for name in repaired])
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
    """Remove groups from a model as a plan says: its parameters become smaller.

    Every parameter stays the object that it is and becomes smaller, one at a time, so that hooks, lists of parameters and
    optimizers follow. Of the old values only what is removed is kept until the end, so that an error anywhere puts model
    and optimizers back as they were, without a second copy of the model.
    Parameters that FSDP2 shards are gathered, cut and sharded again one at a time, and so is their optimizer state; new
    objects take their place. All processes have to call this. What is removed is kept as shards until the end, so that an
    error which all processes meet is undone, too; after an error of one alone (out of memory, a broken connection) the
    others wait for it in vain.
    The state of the optimizers, and of those that they wrap, is cut likewise. State that mirrors weights (slow weights,
    averages) moves along with weights that a repair changes. Gradients are dropped. Module attributes follow the new sizes.

    Removed blocks are deleted from their list, and later ones move up, in the key/value cache, too. The model gets its
    own copy of its config with the new number of blocks, and the blocks' parameters are removed from the optimizers.

    Args:
        model: The model, or a module that holds one; changed in place.
        plan: A plan that fits it.
        optimizers: Optimizers over its parameters; changed in place.
        weights: New values, in the shape after the cut, for some parameters (from :mod:`lit_prune.repair.refit`); biases that
            the plan adds among them.

    Raises:
        PlanError: If the plan or ``weights`` do not fit the model, or the plan is of turned hidden states (``plan.rotated``)
            and those of the model were not turned.
        OptimizerStateError: If an optimizer's state cannot be cut, or the optimizer is of another model.
        ReferenceHeldError: If something else holds tensors of the old sizes.
    """
    plan.check_rotation(model)
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

    A plan of turned hidden states may be applied to any model: the weights that it goes with are loaded afterwards.

    Args:
        model: The model, or a module that holds one.
        plan: A plan that fits it.
        optimizers: Optimizers over its parameters.
        weights: New values for some parameters.
        root: The module that holds the model, and what else may hold parameters of it; ``model`` if ``None``.
    """
    if not plan.rotated:
        return _cut(model, plan, optimizers, weights, root=root)
    journal: list[Callable[[], None]] = []
    optimizers = list(optimizers)
    try:
        inner = model_and_group_sets(model, plan)[0]
        untie_head(inner, find_optimizers(optimizers, model if root is None else root), journal)
        _set_attribute(inner, ROTATED_ATTRIBUTE, True, journal)
        journal.append(_cut(model, plan, optimizers, weights, root=root))
    except BaseException:
        undo_all(journal)
        raise
    return lambda: undo_all(journal)


def cut_as_saved(model: nn.Module, plan: PruningPlan) -> None:
    """Cut a freshly built dense model by the plan of a saved one, whose weights are loaded afterwards.

    What the plan says of how it came about stays: such a model may not be tied yet, so that its parameters cannot be counted.
    """
    with torch.device("cpu"):
        cut(model, plan)
    noted = get_plan(model)
    assert noted is not None
    set_plan(model, replace(noted, info=plan.info))


def _cut(
    model: nn.Module,
    plan: PruningPlan,
    optimizers: Iterable[Any] = (),
    weights: Mapping[str, Tensor] | None = None,
    *,
    root: nn.Module | None = None,
) -> Callable[[], None]:
    """What :func:`cut` does once the model has the parameters that the plan is of."""
    root = model if root is None else root
    model, group_sets = model_and_group_sets(model, plan)
    plan = with_kept_groups(model, plan)
    cuts = parameter_cuts(model, plan, group_sets)
    of_buffers = buffer_cuts(model, plan, group_sets)
    weights = dict(weights or {})
    previous = get_plan(model)
    composed = plan if previous is None else previous.compose(plan)
    before = count_parameters(model) if previous is None else composed.info.get(BEFORE)
    _check_weights(model, cuts, weights, plan)
    touched = {name: {c.dim for c in of_one} for name, of_one in cuts.items()}
    repaired = [name for name in weights if not _is_added(name, plan)]
    found = check_holders(model, root, list(optimizers), touched, adds_biases=bool(plan.biases), repaired=repaired)
    if shards.any_sharded(model.parameters()) is not None:
        _prepare_sharded(model, group_sets, plan)
    restore_modules = module_state(model)
    journal: list[Callable[[], None]] = []
    places, keep_groups = _places(model), groups_after_cut(model, group_sets, plan)

    def undo() -> None:
        with torch.no_grad():
            undo_all(journal)

    try:
        set_caches_aside(model, journal)
        names = [*cuts, *(n for n in repaired if n not in cuts)]
        changed = {id(model.get_parameter(name)) for name in names}
        reset_histories(found, changed | _leaving(model, plan), journal)
        cutter = StateCutter(found, journal)
        cutter.find_mirrors([model.get_parameter(name) for name in names if name in weights])
        for name in names:
            _shrink_parameter(model, name, places, cuts.get(name, []), weights.get(name), cutter, journal)
        for name, of_one in of_buffers.items():
            _shrink_buffer(model, name, of_one, journal)
        for module in plan.biases:
            _add_bias(model, module, weights.get(f"{module}.bias"), cutter, journal)
        _set_attributes(model, group_sets, plan, journal)
        narrow_config(model, plan, journal)
        for entry in plan.blocks:
            _remove_blocks(model, entry, cutter, journal)
        journal.append(keep_groups())
        counted = composed.counted(before, count_parameters(model))
        _set_attribute(model, PLAN_ATTRIBUTE, counted, journal)
        journal.append(save_with_plan(model))
        for step in (s for s in journal if isinstance(s, UndoCut)):
            step.settle()
        forget_compiled(model)
        return undo
    except BaseException:
        with torch.no_grad():
            undo_all([restore_modules, *journal])
        raise


def _prepare_sharded(model: nn.Module, group_sets: Sequence[GroupSet], plan: PruningPlan) -> None:
    """Shard what is gathered, and refuse what FSDP2 cannot follow."""
    shards.reshard(model)
    shards.check_layout(model, group_sets)
    if plan.biases:
        raise PruningError(
            f"The plan adds biases ({plan.biases[0]!r}, ...), which FSDP2 cannot take up in a model that it shards"
            " already. Use repair='least_squares' or repair=None."
        )


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
    for parameter, of_one in cuts.items():
        if parameter.startswith(prefix):
            short = parameter.removeprefix(prefix)
            _shrink_parameter(block, short, places, of_one, None, StateCutter((), journal), journal)
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
                _set_attribute(module, *attribute.followed(module, len(kept), group_set.size - len(kept)), journal)
            for adaptation in (a for a in group_set.adaptations if a.module.startswith(prefix)):
                module = root.get_submodule(adaptation.module.removeprefix(prefix))
                journal.append(adaptation.apply(module, torch.tensor(kept, dtype=torch.long)))


def _is_added(name: str, plan: PruningPlan) -> bool:
    return name.removesuffix(".bias") in plan.biases


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """By the id of every parameter, the modules that hold it and the name that they hold it by."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
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
    put_back = UndoCut(parameter, cuts, stayed, removed, replaced=values is not None)

    def undo() -> None:
        parameter.requires_grad_(requires_grad)
        parameter.grad = gradient

    journal += [undo, put_back]
    parameter.grad = None
    # a layer that lost everything has no gradient to wait for, and DDP would wait
    parameter.requires_grad_(requires_grad and data.numel() > 0)
    set_data(parameter, data)
    journal.extend([sync_sizes(module) for module, _ in owners])
    cutter.cut(parameter, shape, cuts, None if values is None else data - stayed)


def _shrink_buffer(
    model: nn.Module, name: str, cuts: Sequence[DimensionCut], journal: list[Callable[[], None]]
) -> None:
    """Make a buffer smaller; it stays the object that it is."""
    buffer = model.get_buffer(name)
    stayed, removed = cut_tensor(buffer.data, cuts)
    owners = [m for m in model.modules() if any(b is buffer for b in tables(m)[1].values())]
    # once settled it takes the buffer's own values: statistics may have been estimated again, and put back, since
    journal.append(UndoCut(buffer, cuts, stayed, removed, replaced=False))
    set_data(buffer, stayed)
    journal.extend([sync_sizes(module) for module in owners])


def _add_bias(
    model: nn.Module,
    name: str,
    values: Tensor | None,
    cutter: StateCutter,
    journal: list[Callable[[], None]],
) -> None:
    """Give a linear layer or a convolution a bias, also in the optimizers' parameter groups."""
    module: Any = model.get_submodule(name)
    if not (isinstance(module, nn.Linear) or is_convolution(module)) or module.bias is not None:
        raise PlanError(
            f"The plan adds a bias to {name!r}, which is a {type(module).__name__} that has one or takes none."
        )
    outputs = module.weight.shape[output_dim(module)] * (module.groups if isinstance(module, TRANSPOSED) else 1)
    data = torch.zeros(outputs, dtype=module.weight.dtype, device=module.weight.device)
    if values is not None:
        data.copy_(values)
    bias = nn.Parameter(data, requires_grad=module.weight.requires_grad)

    def undo() -> None:
        module.bias = None

    journal.append(undo)
    module.bias = bias
    add_bias(cutter.optimizers, model, name, journal)
    cutter.add(bias, like=module.weight)
