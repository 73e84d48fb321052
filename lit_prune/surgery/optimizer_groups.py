"""Parameter groups of optimizers in step with the model: parameters that leave, new biases, and names.

The order within a group is that of ``module.parameters()`` where it was so before, as an optimizer that a resumed run
builds from the smaller model has it, and states are loaded by position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lit_prune.surgery.optimizer_search import param_groups


def replace_in_groups(optimizers: Sequence[Any], old: Tensor, new: Tensor) -> None:
    """Let a parameter take the place of another one in all groups."""
    for group in param_groups(optimizers):
        group["params"][:] = [new if p is old else p for p in group["params"]]


def _remember(group: Mapping[str, Any], journal: list[Callable[[], None]]) -> None:
    """Note how to put a group's parameters and names back; the lists stay the same objects, which others may hold."""
    for key in ("params", "param_names"):
        if key in group:
            journal.append(lambda kept=group[key], before=list(group[key]): kept.__setitem__(slice(None), before))  # type: ignore[misc]


def remove_from_groups(optimizers: Sequence[Any], gone: Sequence[Tensor], journal: list[Callable[[], None]]) -> None:
    """Take parameters, and their names, out of all groups."""
    identities = {id(p) for p in gone}
    for group in param_groups(optimizers):
        kept = [k for k, p in enumerate(group["params"]) if id(p) not in identities]
        if len(kept) < len(group["params"]):
            _remember(group, journal)
            for key in ("params", "param_names"):
                if key in group:
                    group[key][:] = [group[key][k] for k in kept]


def rename_in_groups(
    optimizers: Sequence[Any], new_names: Mapping[int, tuple[str, str]], journal: list[Callable[[], None]]
) -> None:
    """Let the names of parameters follow those in the model; what precedes the model's own names stays.

    Args:
        optimizers: All optimizers.
        new_names: By the id of a parameter, its name in the model before and now.
        journal: Takes what undoes this.
    """
    for group in param_groups(optimizers):
        if "param_names" not in group:
            continue
        _remember(group, journal)
        for position, (name, parameter) in enumerate(zip(group["param_names"], group["params"], strict=True)):
            before, now = new_names.get(id(parameter), (None, None))
            if before is not None and (name == before or name.endswith(f".{before}")):
                group["param_names"][position] = name.removesuffix(before) + now


def add_bias(
    optimizers: Sequence[Any],
    model: nn.Module,
    name: str,
    journal: list[Callable[[], None]],
) -> None:
    """Put the new bias of a linear layer in the group where the optimizer has others of its kind, in the model's order.

    That is the group of the bias, or else the norm, that is nearest in the model. Where norms are in one group with the
    weights it is a group of biases alone, or one that is empty as the model had no biases; else the group of the weight.
    A bias whose layer's weight no optimizer has is left out, too.

    Args:
        optimizers: All optimizers.
        model: The model, with the bias.
        name: Name of the layer.
        journal: Takes what undoes this.
    """
    groups = param_groups(optimizers)
    weight, bias = model.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.bias")
    held = {id(p) for group in groups for p in group["params"]}
    if id(weight) not in held:
        return
    order = {id(p): k for k, p in enumerate(model.parameters())}
    for group in _groups_for(model, groups, held, name, weight, order):
        _remember(group, journal)
        position = _position(group["params"], weight, order[id(bias)], order)
        if "param_names" in group:
            group["param_names"].insert(position, _bias_name(groups, weight, name))
        group["params"].insert(position, bias)


def add_beside(
    optimizers: Sequence[Any],
    model: nn.Module,
    new: Tensor,
    like: Tensor,
    journal: list[Callable[[], None]],
) -> None:
    """Put a new parameter of the model in the groups that hold another one, in the model's order.

    Args:
        optimizers: All optimizers.
        model: The model, with the new parameter.
        new: The new parameter.
        like: The other one.
        journal: Takes what undoes this.
    """
    order = {id(p): k for k, p in enumerate(model.parameters())}
    names = {id(p): n for n, p in model.named_parameters()}
    for group in param_groups(optimizers):
        if any(p is like for p in group["params"]):
            _remember(group, journal)
            position = _position(group["params"], like, order[id(new)], order)
            if "param_names" in group:
                group["param_names"].insert(position, names[id(new)])
            group["params"].insert(position, new)


def _groups_for(
    model: nn.Module,
    groups: Sequence[dict[str, Any]],
    held: set[int],
    name: str,
    weight: Tensor,
    order: Mapping[int, int],
) -> list[dict[str, Any]]:
    own = [g for g in groups if any(p is weight for p in g["params"])]
    lines = [(n, p) for n, p in model.named_parameters() if p.dim() == 1 and id(p) in held]

    def nearest(candidates: Sequence[tuple[str, Tensor]]) -> Tensor:
        def distance(item: tuple[str, Tensor]) -> tuple[int, bool, int]:
            other, parameter = item
            return -_shared_depth(other, name), not _is_bias(other), abs(order[id(parameter)] - order[id(weight)])

        return min(candidates, key=distance)[1]

    def holding(parameter: Tensor) -> list[dict[str, Any]]:
        return [g for g in groups if any(p is parameter for p in g["params"])]

    found = holding(nearest(lines)) if lines else own
    if any(g is f for g in own for f in found):
        # norms are with the weights; biases may be apart from both
        apart = {id(p) for g in groups if not any(q.dim() > 1 for q in g["params"]) for p in g["params"]}
        biases = [(n, p) for n, p in lines if _is_bias(n) and id(p) in apart]
        empty = [g for g in groups if not g["params"]]
        found = holding(nearest(biases)) if biases else empty[:1] or own
    return found


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"


def _shared_depth(first: str, second: str) -> int:
    depth = 0
    for a, b in zip(first.split("."), second.split("."), strict=False):
        if a != b:
            break
        depth += 1
    return depth


def _position(parameters: Sequence[Tensor], weight: Tensor, place: int, order: Mapping[int, int]) -> int:
    places = [order.get(id(p), -1) for p in parameters]
    known = [p for p in places if p >= 0]
    if known == sorted(known):
        later = [k for k, p in enumerate(places) if p > place]
        earlier = [k for k, p in enumerate(places) if 0 <= p < place]
        # parameters of other modules may come before or after those of the model
        return later[0] if later else earlier[-1] + 1 if earlier else len(places)
    beside = [k for k, p in enumerate(parameters) if p is weight]
    return beside[0] + 1 if beside else len(places)


def _bias_name(groups: Sequence[dict[str, Any]], weight: Tensor, name: str) -> str:
    for group in groups:
        for known, parameter in zip(group.get("param_names", ()), group["params"], strict=False):
            if parameter is weight:
                return f"{known.removesuffix('.weight')}.bias"
    return f"{name}.bias"
