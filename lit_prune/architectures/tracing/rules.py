"""The table of rules by ATen operator, and what a rule is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_prune.architectures.tracing.fields import Rules, Value, only_varying
from lit_prune.torch_internals import tree_leaves


class Tracer(Protocol):
    """What rules need of the tracer."""

    rules: Rules

    def value(self, tensor: Tensor) -> Value:
        """What is known of a tensor."""

    def reads(self, weight: Value, dim: int, other: Value) -> None:
        """Note that the weight's positions along ``dim`` are multiplied with the positions of another value."""

    def met_shape(self, fields: Iterable[Tensor]) -> None:
        """Note that the running module gave tensors with these fields another shape, which may come from its integers."""

    def met_split(self, sizes: Sequence[int], dim: int, fields: Iterable[Tensor]) -> None:
        """Note that the running module split a tensor with these fields along a dimension into parts of some sizes."""

    def met_number(self, labels: Tensor, dim: int, count: int) -> None:
        """Note that the running module used the number of the first positions along a dimension of a field."""

    def met_dimension(self, labels: Tensor, dim: int, shape: Sequence[int]) -> None:
        """Note that the running module gave a tensor with a field this shape, and that the field varies along a dimension."""

    def met(self, fields: Iterable[Tensor]) -> None:
        """Note that the fields went through a product of two activations side by side, as heads do."""


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Args:
        tracer: The tracer.
        operator: The overload that was called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        result: What it returned.
    """

    tracer: Tracer
    operator: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    result: Any

    @property
    def rules(self) -> Rules:
        """What is shared by rules."""
        return self.tracer.rules

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, however it was given."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def values(self) -> list[Value]:
        """What is known of all tensors among the arguments."""
        return [self.tracer.value(t) for t in self.tensors()]

    def results(self) -> list[Tensor]:
        """All tensors that were returned."""
        return [leaf for leaf in tree_leaves(self.result) if isinstance(leaf, Tensor)]


Rule = Callable[[Call], list[Value]]
"""Gives what is known of every tensor that was returned, in their order."""

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operators, by their names without overload (``"view"`` for ``aten.view.default``)."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"There is a rule for {name!r} already.")
            RULES[name] = function
        return function

    return register


def output(result: Tensor, fields: Iterable[Tensor], inputs: Sequence[Value]) -> Value:
    """The value of a result: its fields, and whether it comes from parameters or factories alone."""
    constant = bool(inputs) and all(v.constant for v in inputs)
    weight = any(v.weight for v in inputs) and all(v.weight or v.constant or v.shape == () for v in inputs)
    return Value(tuple(result.shape), only_varying(fields), constant, weight)


def elementwise(call: Call) -> list[Value]:
    """Every element is computed from the elements at its position."""
    values = call.values()
    results = []
    for result in call.results():
        rank = result.dim()
        fitting = [v for v in values if len(v.shape) <= rank]
        for value in values:
            if len(value.shape) > rank:
                call.rules.rigid(value)
        results.append(output(result, call.rules.merge(fitting, result.shape), values))
    return results


def unknown(call: Call) -> list[Value]:
    """Nothing is known of the operator: what goes into it stays whole."""
    for value in call.values():
        call.rules.rigid(value)
    return [Value(tuple(r.shape)) for r in call.results()]


def normal(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim % max(rank, 1)


def is_pointwise(operator: Any) -> bool:
    """Whether PyTorch says that an operator works element by element."""
    return torch.Tag.pointwise in operator.tags
