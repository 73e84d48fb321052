"""What optimizers remember of parameters: what of it can follow a cut, cutting it, and undoing that.

Cut is every state tensor of the parameter's own shape, or of that shape with 1 in some dimensions (factored statistics).
State that mirrors weights, the slow weights of Lookahead for instance, moves along where a repair changes weights. What no
rule fits is refused before anything changes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_prune.distributed import shards
from lit_prune.errors import OptimizerStateError
from lit_prune.surgery.optimizer_search import find_optimizers, is_lbfgs, is_optimizer, key_of, states
from lit_prune.surgery.references import attributes
from lit_prune.surgery.sharded_tensors import ShardedCut
from lit_prune.surgery.state_entries import AttributeName, Found, Path, Position, entries_in, tensors_in
from lit_prune.surgery.tensors import DimensionCut, UndoCut, cut_tensor, move_to_cpu, set_data
from lit_prune.torch_internals import base_of, forget_size

_ADVICE = "prune before training begins, while the optimizer has no state yet, or use another optimizer."
# a mirror of weights points where they do, while what is made of gradients is nearly orthogonal to them
_MIRROR_COSINE = 0.5
# signs of gradients agree with those of weights by chance: one in two
_FEWEST_SIGNS, _STRAY_SIGNS = 32, 0.01


def check_state(model: nn.Module, optimizers: Sequence[Any], touched: Mapping[str, Collection[int]]) -> None:
    """Refuse state that cannot follow a cut.

    Args:
        model: The model.
        optimizers: All optimizers, see :func:`lit_prune.surgery.optimizer_search.find_optimizers`.
        touched: By the name of every parameter that may be cut, the dimensions along which it may lose something.

    Raises:
        OptimizerStateError: Naming optimizer, parameter, state key and shapes.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for optimizer in optimizers:
        if is_lbfgs(optimizer):
            continue
        for attribute, mapping in states(optimizer):
            fit, unfit = _paths(optimizer, mapping)
            for name in touched:
                parameter = parameters[name]
                for found in entries_in(_state_of(mapping, parameter)):
                    reason = _misfit(found, parameter, fit, unfit)
                    if reason is not None:
                        raise OptimizerStateError(
                            f"{type(optimizer).__name__} {attribute} {found} of {name!r} {reason} This optimizer's state"
                            f" cannot be cut: {_ADVICE}"
                        )
        _check_loose(optimizer, {name: parameters[name] for name in touched})


def check_repairable(optimizers: Sequence[Any], parameters: Sequence[Tensor]) -> None:
    """Refuse optimizers that compute the weights anew from their state in every step, and so would lose new weights.

    Those of the family of dual averaging (FTRL) keep a sum whose entries all have the opposite sign of the weights.

    Args:
        optimizers: All optimizers, see :func:`lit_prune.surgery.optimizer_search.find_optimizers`.
        parameters: The parameters that a repair may give new weights.

    Raises:
        OptimizerStateError: Naming optimizer and state key.
    """
    for optimizer in optimizers:
        for attribute, mapping in () if is_lbfgs(optimizer) else states(optimizer):
            opposed: dict[Path, Tensor] = {}
            for parameter in parameters:
                for found in tensors_in(_state_of(mapping, parameter)):
                    if found.value.shape == parameter.shape and found.value.is_floating_point():
                        sign = shards.local(found.value.detach()).sign() * shards.local(parameter.detach()).sign()
                        counts = torch.stack([(sign < 0).sum(), (sign > 0).sum()]).cpu()
                        opposed[found.path] = opposed.get(found.path, 0) + counts
            for path, (against, along) in opposed.items():
                if against >= _FEWEST_SIGNS and along <= _STRAY_SIGNS * against:
                    raise OptimizerStateError(
                        f"{type(optimizer).__name__} computes the weights anew from {attribute} {Found(path, None)} in every"
                        " step, so weights that the repair changes would soon be lost. Use repair=None, or another"
                        " optimizer."
                    )


def _parameters(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _state_of(mapping: Mapping[Any, Any], parameter: Tensor) -> Any:
    key = key_of(mapping, parameter)
    state = mapping.get(key, {})
    # a tensor by itself needs a key, too
    return {"": state} if isinstance(state, Tensor) else state


def _fits(value: Tensor, shape: torch.Size) -> bool:
    return value.numel() == 1 or (
        value.dim() == len(shape) and all(v in (1, s) for v, s in zip(value.shape, shape, strict=True))
    )


def _misfit(found: Found, parameter: Tensor, fit: Collection[Path], unfit: Collection[Path]) -> str | None:
    """Why something in a parameter's state cannot follow a cut of the parameter, ``None`` if it can."""
    value, shape = found.value, tuple(parameter.shape)
    if not isinstance(value, Tensor):
        recorded = len(shape) > 1 and tuple(value) == shape
        return f"records the shape {shape} of the parameter, which would be wrong after the cut." if recorded else None
    if value.numel() == 1:
        return None
    if not _fits(value, parameter.shape):
        return (
            f"has shape {tuple(value.shape)}, the parameter {shape}; expected the same shape, or 1 in some dimensions."
        )
    if type(value) not in (Tensor, nn.Parameter, DTensor) or value.layout != torch.strided or value.is_quantized:
        return f"is a {type(value).__name__} of layout {value.layout}; expected a plain dense tensor."
    if found.inside(AttributeName):
        return "is in an object, which may rely on the shape it has."
    if isinstance(value, DTensor) and (not isinstance(found.holder, MutableMapping) or found.path == ("",)):
        return "is a sharded tensor in a sequence, where it cannot be replaced."
    if (base := base_of(value)) is not None and base.numel() > value.numel():
        return "is a view into a larger tensor, which would not change with it."
    square = len(shape) > 1 and len(set(shape)) < len(shape)
    if square and (found.path in unfit or (found.inside(Position) and found.path not in fit)):
        return (
            f"has shape {tuple(value.shape)}, as the parameter has, which is square: whether it has an entry for each of"
            " the parameter, or relates rows to rows, cannot be told."
        )
    return None


def _paths(optimizer: Any, mapping: Mapping[Any, Any]) -> tuple[set[Path], set[Path]]:
    """Places in the state of an optimizer where all matrices that are not square fit, and where something does not."""
    fit, unfit = set(), set()
    for parameter in _parameters(optimizer):
        for found in tensors_in(_state_of(mapping, parameter)):
            if not _fits(found.value, parameter.shape):
                unfit.add(found.path)
            elif len(set(parameter.shape)) > 1 and found.value.numel() > 1:
                fit.add(found.path)
    return fit, unfit


def _check_loose(optimizer: Any, touched: Mapping[str, Tensor]) -> None:
    """Refuse tensors for parameters that an optimizer keeps by another key than the parameter."""
    own = {id(p) for p in _parameters(optimizer)}
    if not any(id(p) in own for p in touched.values()):
        return
    keyed = {id(mapping) for _, mapping in states(optimizer)}
    shapes = {tuple(p.shape) for p in touched.values() if p.numel() > 1}
    lengths = {sum(p.numel() for p in group["params"]) for group in optimizer.param_groups}
    lengths.add(sum(p.numel() for p in _parameters(optimizer)))
    places = [(name, value) for name, value in attributes(optimizer) if name not in ("param_groups", "defaults")]
    places += [(f"state[{key!r}]", value) for key, value in optimizer.state.items() if isinstance(key, str)]
    for group in optimizer.param_groups:
        places += [(f"param_groups[{key!r}]", value) for key, value in group.items() if key != "params"]
    for name, value in places:
        if id(value) in keyed or is_optimizer(value) or "hook" in name:
            continue
        for found in tensors_in(value):
            shape, size = tuple(found.value.shape), found.value.numel()
            named = any(
                key == n or n.endswith(f".{key}") for key in found.path if isinstance(key, str) for n in touched
            )
            fits = shape in shapes or (len(shape) == 1 and size in lengths) or (named and size > 1)
            if fits and id(found.value) not in own:
                raise OptimizerStateError(
                    f"{type(optimizer).__name__}.{name} holds a tensor of shape {shape}, which may belong to parameters that"
                    f" are to be cut, but is not kept by parameter. This optimizer's state cannot be cut: {_ADVICE}"
                )


def reset_histories(optimizers: Iterable[Any], touched: Collection[int], journal: list[Callable[[], None]]) -> None:
    """Let optimizers that keep a history over all parameters at once (LBFGS) start again from the smaller parameters.

    Args:
        optimizers: All optimizers.
        touched: Ids of the parameters that change in size or leave.
        journal: Takes what undoes this.
    """
    for optimizer in optimizers:
        if is_lbfgs(optimizer) and any(id(p) in touched for p in _parameters(optimizer)):
            before = dict(optimizer.state)

            def undo(optimizer: Any = optimizer, before: dict[Any, Any] = before) -> None:
                optimizer.state.clear()
                optimizer.state.update(before)

            journal.append(undo)
            optimizer.state.clear()
            journal.append(forget_size(optimizer))


@dataclass
class StateCutter:
    """Cuts what optimizers remember of one parameter after the other.

    Args:
        optimizers: All optimizers over the model.
        journal: Takes what undoes each step.
    """

    optimizers: Sequence[Any]
    journal: list[Callable[[], None]]
    _mirrors: dict[tuple[int, Path], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = {id(m): m for o in self.optimizers if not is_lbfgs(o) for _, m in states(o)}
        self.mappings: list[Any] = list(found.values())

    def find_mirrors(self, parameters: Sequence[Tensor]) -> None:
        r"""Find the state that mirrors weights, from parameters that a repair will change.

        That is state of the parameter's shape which points where the weights do, by its median cosine over matrices; by its
        factor :math:`c = \langle s, w \rangle / \langle w, w \rangle`, taken for 1 if near it, it moves with new weights:
        :math:`s \leftarrow s + c\,(w' - w)`. So what lies between slow and fast weights, or is the distance from the first
        ones, stays what it was.
        """
        matrices = [p for p in parameters if p.dim() > 1] or list(parameters)
        for mapping in self.mappings:
            measured: dict[Path, list[tuple[float, float]]] = {}
            for parameter in matrices:
                for found in tensors_in(_state_of(mapping, parameter)):
                    if found.value.shape == parameter.shape and found.value.is_floating_point():
                        measured.setdefault(found.path, []).append(_likeness(found.value, parameter.detach()))
            for path, values in measured.items():
                cosine, factor = torch.tensor(values, dtype=torch.float64).median(dim=0).values.tolist()
                if cosine >= _MIRROR_COSINE:
                    self._mirrors[id(mapping), path] = 1.0 if abs(factor - 1) < 0.3 else factor

    def cut(self, parameter: Tensor, shape: torch.Size, cuts: Sequence[DimensionCut], change: Tensor | None) -> None:
        """Cut the state for a parameter, and move what mirrors its weights.

        Args:
            parameter: The parameter, which may be cut already.
            shape: Its shape before.
            cuts: What leaves.
            change: New weights less old ones, after the cut, if they are repaired.
        """
        done: set[int] = set()
        for mapping in self.mappings:
            for found in list(tensors_in(_state_of(mapping, parameter))):
                if id(found.value) not in done:
                    done.add(id(found.value))
                    factor = self._mirrors.get((id(mapping), found.path), 0.0) if change is not None else 0.0
                    self._cut_one(found, shape, cuts, change, factor)

    def _cut_one(
        self, found: Found, shape: torch.Size, cuts: Sequence[DimensionCut], change: Tensor | None, factor: float
    ) -> None:
        value = found.value
        moves = factor != 0 and value.shape == shape
        applied = [c for c in cuts if value.dim() == len(shape) and value.shape[c.dim] == shape[c.dim] > 1]
        if value.numel() == 1 or not (applied or moves):
            return
        if isinstance(value, DTensor):
            self._cut_sharded(found, applied, change if moves else None, factor)
            return
        stayed, left = cut_tensor(value.detach(), applied)
        self.journal.append(UndoCut(value, applied, stayed, left, replaced=moves))
        set_data(value, stayed if change is None or not moves else stayed + factor * change.to(stayed))

    def _cut_sharded(self, found: Found, cuts: Sequence[DimensionCut], change: Tensor | None, factor: float) -> None:
        value, holder, key = found.value, found.holder, found.path[-1]
        assert isinstance(value, DTensor)
        kept = ShardedCut(value, cuts)
        whole = kept.whole if change is None else kept.whole + factor * change.to(kept.whole)
        new = holder[key] = shards.shard_like(whole, value)
        kept.let_go(keep=change is not None)
        self.journal.append(lambda: holder.update({key: shards.shard_like(kept.pasted(new), new)}))

    def add(self, parameter: Tensor, like: Tensor) -> None:
        """Give a new parameter the state that wrapping optimizers make for all parameters when they are built.

        What they wrap makes its state in the first step. State that mirrors weights begins as the new weights.

        Args:
            parameter: The parameter.
            like: One that the optimizers have already, the weight of the same layer.

        Raises:
            OptimizerStateError: If a wrapper has other state than mirrors, zeros and numbers.
        """
        for wrapper in self.optimizers:
            inner = [o for o in find_optimizers([wrapper]) if o is not wrapper]
            mapping = wrapper.state
            if not inner or any(mapping is o.state for o in inner) or like not in mapping:
                continue
            if any(p is parameter for group in wrapper.param_groups for p in group["params"]):
                mapping[parameter] = self._begun(wrapper, mapping[like], parameter, like)
                self.journal.append(lambda mapping=mapping: mapping.pop(parameter, None))  # type: ignore[misc]

    def _begun(self, wrapper: Any, state: Mapping[str, Any], parameter: Tensor, like: Tensor) -> dict[str, Any]:
        begun: dict[str, Any] = {}
        for key, value in state.items():
            if not isinstance(value, Tensor):
                begun[key] = value
            elif value.shape == like.shape and _likeness(value, like)[0] >= _MIRROR_COSINE:
                begun[key] = parameter.detach().clone()
            elif value.shape == like.shape and not value.any():
                begun[key] = torch.zeros_like(parameter)
            else:
                raise OptimizerStateError(
                    f"repair='bias' gives layers new biases, and {type(wrapper).__name__} keeps {key!r} for each parameter;"
                    " how to begin it for a new one is not known. Use repair='least_squares' or repair=None."
                )
        return begun

    def rename(self, old: Tensor, new: Tensor) -> None:
        """Let state of one parameter be that of another, which takes its place."""
        for mapping in self.mappings:
            before, after = key_of(mapping, old), key_of(mapping, new)
            if before in mapping:
                mapping[after] = mapping.pop(before)

    def drop(self, parameters: Sequence[Tensor]) -> None:
        """Forget parameters that leave the model."""
        for mapping in self.mappings:
            keys = [key for key in (key_of(mapping, p) for p in parameters) if key in mapping]
            dropped = {key: mapping[key] for key in keys}
            self.journal.append(lambda mapping=mapping, dropped=dropped: mapping.update(dropped))  # type: ignore[misc]
            self.journal.append(move_to_cpu(found.value for found in tensors_in(dropped) if found.value.numel() > 1))
            for key in keys:
                del mapping[key]


def _likeness(state: Tensor, weight: Tensor) -> tuple[float, float]:
    """Cosine between a state and a weight, and the factor of the weight in the state."""
    products = [(a.float() * b.float()).sum() for a, b in ((state, weight), (state, state), (weight, weight))]
    across, of_state, of_weight = (float(shards.full(product)) for product in products)
    if of_state == 0 or of_weight == 0:
        return 0.0, 0.0
    return across / (of_state * of_weight) ** 0.5, across / of_weight
