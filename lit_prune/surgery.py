"""Applies a plan to a model and to its optimizers: smaller parameters, sliced optimizer state, consistent attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_prune import sharding
from lit_prune.architectures import find_group_sets, find_model
from lit_prune.architectures.base import depth_of
from lit_prune.config_view import override_config
from lit_prune.errors import PlanError, PruningError
from lit_prune.groups import GroupSet, check_names, count_parameters
from lit_prune.modeling_pruned import change_config, keep_blocks, of_kept_blocks
from lit_prune.modeling_pruned import sync_features as _sync_features
from lit_prune.plan import BEFORE, DEPTH_ATTRIBUTE, PLAN_ATTRIBUTE, PlanEntry, PruningPlan, get_plan
from lit_prune.saving import save_with_plan


@dataclass(frozen=True, eq=False)
class Cut:
    """What stays and what leaves along one dimension of a parameter.

    Args:
        dim: The dimension.
        kept: Positions that stay, ascending.
        removed: Positions that leave, ascending.
    """

    dim: int
    kept: Tensor
    removed: Tensor


def parameter_cuts(model: nn.Module, plan: PruningPlan, group_sets: Sequence[GroupSet]) -> dict[str, list[Cut]]:
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
    cuts: dict[str, list[Cut]] = {}
    for (name, dim), mask in masks.items():
        cuts.setdefault(name, []).append(Cut(dim, mask.nonzero().flatten(), (~mask).nonzero().flatten()))
    return cuts


def apply_plan(
    model: nn.Module,
    plan: PruningPlan,
    optimizers: Iterable[Optimizer] = (),
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Cut the model for real.

    Every touched parameter is replaced by a smaller one, one at a time; of the old ones only what leaves is kept until the
    end, so that an error anywhere puts model and optimizers back as they were, without a second copy of the model.
    Parameters that FSDP2 shards are gathered, cut and sharded again one at a time, and so is their optimizer state; all
    processes have to call this. What leaves is kept as shards until the end, so that an error which all processes meet is
    undone, too; after an error of one alone (out of memory, a broken connection) the others wait for it in vain.
    The state of the optimizers (moments of a parameter's shape) is cut likewise, and the new parameters take the place of
    the old ones in ``param_groups``. Gradients are dropped. Module attributes follow the new sizes.

    Blocks that leave are taken out of their list; those behind them move up, also in the cache of keys and values. The model
    gets a config of its own that says how many there are now, and their parameters leave the optimizers.

    Args:
        model: The model, or a module that holds one; changed in place.
        plan: A plan that fits it.
        optimizers: Optimizers over its parameters; changed in place.
        weights: New values, in the shape after the cut, for some parameters (from :mod:`lit_prune.repair`); biases that
            the plan adds among them.

    Raises:
        PlanError: If the plan or ``weights`` do not fit the model.
        PruningError: If an optimizer's state cannot be cut.
    """
    cut(model, plan, optimizers, weights)


@torch.no_grad()
def cut(
    model: nn.Module,
    plan: PruningPlan,
    optimizers: Iterable[Optimizer] = (),
    weights: Mapping[str, Tensor] | None = None,
) -> Callable[[], None]:
    """Do what :func:`apply_plan` does, and return a function that undoes it; that holds on to everything that left."""
    model = find_model(model)[1]
    group_sets = find_group_sets(model, blocks=bool(plan.blocks))
    cuts = parameter_cuts(model, plan, group_sets)
    weights = dict(weights or {})
    optimizers = list(optimizers)
    previous = get_plan(model)
    composed = plan if previous is None else previous.then(plan)
    before = count_parameters(model) if previous is None else composed.info.get(BEFORE)
    unknown = (
        set(weights)
        - set(cuts)
        - {f"{module}.bias" for module in plan.biases}
        - {n for n, _ in model.named_parameters()}
    )
    if unknown:
        raise PlanError(f"New weights were given for {sorted(unknown)[:3]}, which the model does not have.")
    if sharding.any_sharded(model.parameters()) is not None:
        sharding.reshard(model)
        sharding.check_layout(model, group_sets)
        _check_sharded(model, cuts, weights, plan, optimizers)
    journal: list[Callable[[], None]] = []
    places = _places(model)

    def undo() -> None:
        with torch.no_grad():
            for step in reversed(journal):
                step()

    try:
        for name in (*cuts, *(n for n in weights if n not in cuts and not _is_added(n, plan))):
            _replace_parameter(model, name, places, cuts.get(name, []), weights.get(name), optimizers, journal)
        for module in plan.biases:
            _add_bias(model, module, weights.get(f"{module}.bias"), optimizers, journal)
        _set_attributes(model, group_sets, plan, journal)
        for entry in plan.blocks:
            _remove_blocks(model, entry, optimizers, journal)
        counted = composed.counted(before, count_parameters(model))
        _set_attribute(model, PLAN_ATTRIBUTE, counted, journal)
        journal.append(save_with_plan(model))
    except BaseException:
        undo()
        raise
    return undo


def _check_sharded(
    model: nn.Module,
    cuts: Mapping[str, Sequence[Cut]],
    weights: Mapping[str, Tensor],
    plan: PruningPlan,
    optimizers: Sequence[Optimizer],
) -> None:
    """Find what would fail in the middle of cutting a sharded model."""
    if plan.biases:
        raise PruningError(
            f"The plan adds biases ({plan.biases[0]!r}, ...), which FSDP2 cannot take up in a model that it shards already."
            " Use repair='least_squares' or repair=None."
        )
    for name in {*cuts, *weights}:
        parameter = model.get_parameter(name)
        shape = list(parameter.shape)
        for cut in cuts.get(name, ()):
            shape[cut.dim] = len(cut.kept)
        if name in weights and list(weights[name].shape) != shape:
            raise PlanError(
                f"New weights for {name!r} have shape {tuple(weights[name].shape)}; expected {tuple(shape)}."
            )
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    what = f"{type(optimizer).__name__} state {key!r} of {name!r}"
                    _state_cuts(value, parameter.shape, cuts.get(name, ()), what)


@torch.no_grad()
def cut_block(
    block: nn.Module, name: str, plan: PruningPlan, group_sets: Sequence[GroupSet], cuts: Mapping[str, Sequence[Cut]]
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
            _replace_parameter(block, parameter.removeprefix(prefix), places, parameter_cuts, None, (), journal)
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


def _remove_blocks(
    model: nn.Module, entry: PlanEntry, optimizers: Sequence[Optimizer], journal: list[Callable[[], None]]
) -> None:
    """Take blocks out of their list, out of the optimizers, and out of what the model says of its depth."""
    blocks: Any = model.get_submodule(entry.name)
    gone = [blocks[i] for i in set(range(entry.size)) - set(entry.kept)]
    for optimizer in optimizers:
        _remove_from_optimizer(optimizer, [p for block in gone for p in block.parameters()], journal)
    journal.extend(sharding.release(block) for block in gone)
    journal.append(keep_blocks(blocks, entry.kept))
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


def _remove_from_optimizer(
    optimizer: Optimizer, gone: Sequence[nn.Parameter], journal: list[Callable[[], None]]
) -> None:
    identities = {id(p) for p in gone}
    groups = [(group, group["params"]) for group in optimizer.param_groups]
    states: dict[Tensor, Any] = {p: optimizer.state[p] for p in gone if p in optimizer.state}

    def undo() -> None:
        for group, parameters in groups:
            group["params"] = parameters
        optimizer.state.update(states)

    journal.append(undo)
    for group, parameters in groups:
        group["params"] = [p for p in parameters if id(p) not in identities]
    for parameter in states:
        del optimizer.state[parameter]


def _is_added(name: str, plan: PruningPlan) -> bool:
    return name.removesuffix(".bias") in plan.biases


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """By the id of every parameter, the modules that hold it and the name that they hold it by."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            places.setdefault(id(parameter), []).append((module, key))
    return places


def _cut(tensor: Tensor, cuts: Sequence[Cut]) -> tuple[Tensor, list[Tensor]]:
    """Cut a tensor; also return what left, from which :func:`_paste` restores it bit for bit."""
    left = []
    for cut in cuts:
        left.append(tensor.index_select(cut.dim, cut.removed.to(tensor.device)))
        tensor = tensor.index_select(cut.dim, cut.kept.to(tensor.device))
    return tensor, left


def _paste(tensor: Tensor, cuts: Sequence[Cut], left: Sequence[Tensor]) -> Tensor:
    for cut, removed in zip(reversed(cuts), reversed(left), strict=True):
        shape = list(tensor.shape)
        shape[cut.dim] = len(cut.kept) + len(cut.removed)
        full = tensor.new_empty(shape)
        full.index_copy_(cut.dim, cut.kept.to(tensor.device), tensor)
        full.index_copy_(cut.dim, cut.removed.to(tensor.device), removed)
        tensor = full
    return tensor


def _replace_parameter(
    model: nn.Module,
    name: str,
    places: Mapping[int, Sequence[tuple[nn.Module, str]]],
    cuts: Sequence[Cut],
    values: Tensor | None,
    optimizers: Sequence[Optimizer],
    journal: list[Callable[[], None]],
) -> None:
    old = model.get_parameter(name)
    owners = places[id(old)]
    if isinstance(old, DTensor):
        _replace_sharded(model, old, owners, cuts, values, optimizers, journal)
        return
    data, left = _cut(old.data, cuts)
    original = data
    if values is not None:
        if values.shape != data.shape:
            raise PlanError(f"New weights for {name!r} have shape {tuple(values.shape)}; expected {tuple(data.shape)}.")
        data = values.to(dtype=data.dtype, device=data.device, copy=True).contiguous()
    # a layer that lost everything has no gradient to wait for, and DDP would wait
    new = nn.Parameter(data, requires_grad=old.requires_grad and data.numel() > 0)
    new.__dict__.update(old.__dict__)
    gradient = old.grad
    shape = old.shape

    def undo() -> None:
        old.data = _paste(original, cuts, left) if cuts else original
        old.grad = gradient
        for module, key in owners:
            module._parameters[key] = old
            _sync_features(module)

    journal.append(undo)
    for module, key in owners:
        module._parameters[key] = new
        _sync_features(module)
    if cuts:
        old.data = old.data.new_empty(0)
    old.grad = None
    for optimizer in optimizers:
        _replace_in_optimizer(optimizer, name, old, new, shape, cuts, journal)


def _replace_sharded(
    model: nn.Module,
    old: DTensor,
    owners: Sequence[tuple[nn.Module, str]],
    cuts: Sequence[Cut],
    values: Tensor | None,
    optimizers: Sequence[Optimizer],
    journal: list[Callable[[], None]],
) -> None:
    shape, gradient = old.shape, old.grad
    kept = _ShardedCut(old, cuts)
    new = _put_sharded(
        model, old, owners, kept.whole if values is None else sharding.full(values).to(old.dtype), optimizers
    )
    kept.let_go(keep=values is not None)

    def undo() -> None:
        restored = _put_sharded(model, new, owners, kept.pasted(new), optimizers)
        restored.grad = gradient

    journal.append(undo)
    for optimizer in optimizers:
        state = optimizer.state.get(new, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                applied = _state_cuts(value, shape, cuts, key)
                if isinstance(value, DTensor):
                    _cut_sharded_state(state, key, value, applied, journal)
                else:
                    state[key], left = _cut(value, applied)
                    journal.append(lambda s=state, k=key, a=applied, r=left: s.update({k: _paste(s[k], a, r)}))  # type: ignore[misc]


def _cut_sharded_state(
    state: dict[str, Any], key: str, value: DTensor, cuts: Sequence[Cut], journal: list[Callable[[], None]]
) -> None:
    kept = _ShardedCut(value, cuts)
    state[key] = sharding.shard_like(kept.whole, value)
    kept.let_go()
    like = state[key]
    journal.append(lambda: state.update({key: sharding.shard_like(kept.pasted(state[key]), like)}))


class _ShardedCut:
    """A sharded tensor, gathered and cut; of what left, this process keeps its share."""

    def __init__(self, tensor: DTensor, cuts: Sequence[Cut]) -> None:
        self._cuts, self._like = cuts, tensor
        self.whole, left = _cut(sharding.full(tensor), cuts)
        self._left = [sharding.shard_like(part, tensor) for part in left]
        self._kept: DTensor | None = None

    def let_go(self, keep: bool = False) -> None:
        """Free what was gathered; with ``keep``, keep this process's share of it for :meth:`pasted`."""
        if keep:
            self._kept = sharding.shard_like(self.whole, self._like)
        del self.whole, self._like

    def pasted(self, kept: DTensor) -> Tensor:
        """The whole tensor from before the cut; ``kept`` is what stayed of it, unless that was kept here."""
        stayed = sharding.full(kept if self._kept is None else self._kept)
        return _paste(stayed, self._cuts, [sharding.full(part) for part in self._left])


def _put_sharded(
    model: nn.Module,
    old: DTensor,
    owners: Sequence[tuple[nn.Module, str]],
    whole: Tensor,
    optimizers: Sequence[Optimizer],
) -> DTensor:
    """Put a new value of other sizes in the place of a sharded parameter, in the model and in the optimizers."""
    new: Any = sharding.replace(model, old, whole)
    for module, _ in owners:
        _sync_features(module)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        if old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)
    return new


def _replace_in_optimizer(
    optimizer: Optimizer,
    name: str,
    old: nn.Parameter,
    new: nn.Parameter,
    shape: torch.Size,
    cuts: Sequence[Cut],
    journal: list[Callable[[], None]],
) -> None:
    for group in optimizer.param_groups:
        for position, parameter in enumerate(group["params"]):
            if parameter is old:
                group["params"][position] = new
                journal.append(lambda group=group, position=position: group["params"].__setitem__(position, old))  # type: ignore[misc]
    if old not in optimizer.state:
        return
    state = optimizer.state.pop(old)
    before = dict(state)
    replaced: list[tuple[str, Tensor, Sequence[Cut], list[Tensor]]] = []

    def undo() -> None:
        optimizer.state.pop(new, None)
        for key, tensor, applied, left in replaced:
            before[key] = _paste(tensor, applied, left)
        state.update(before)
        optimizer.state[old] = state

    journal.append(undo)
    for key in list(state):
        value = state[key]
        if isinstance(value, Tensor) and value.dim() > 0:
            applied = _state_cuts(value, shape, cuts, f"{type(optimizer).__name__} state {key!r} of {name!r}")
            state[key], left = _cut(value, applied)
            replaced.append((key, state[key], applied, left))
            before[key] = None
    optimizer.state[new] = state


def _state_cuts(value: Tensor, shape: torch.Size, cuts: Sequence[Cut], what: str) -> list[Cut]:
    """The cuts that apply to a state tensor: of the parameter's shape, or of that shape with some dimensions of size 1."""
    if value.numel() == 1:
        return []
    if value.dim() != len(shape) or any(v not in (1, s) for v, s in zip(value.shape, shape, strict=True)):
        raise PruningError(
            f"{what} has shape {tuple(value.shape)}, the parameter {tuple(shape)}; expected the same shape, or 1 in some"
            " dimensions. This optimizer's state cannot be cut: prune before training, or use another optimizer."
        )
    return [cut for cut in cuts if value.shape[cut.dim] == shape[cut.dim]]


def _add_bias(
    model: nn.Module,
    name: str,
    values: Tensor | None,
    optimizers: Sequence[Optimizer],
    journal: list[Callable[[], None]],
) -> None:
    """Give a linear layer a bias, beside its weight in the optimizers' param_groups."""
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
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(p is module.weight for p in group["params"]):
                group["params"].append(bias)
                journal.append(lambda group=group: group["params"].pop())


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
