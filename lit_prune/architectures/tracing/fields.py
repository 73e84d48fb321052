"""Which positions of which parameters the elements of a tensor belong to, and what operators do to that."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_prune.architectures.tracing.labels import Labels

Field = Tensor
"""Labels of the elements of a tensor: as many dimensions as the tensor, of size 1 where the label does not vary."""


@dataclass
class Value:
    """What is known of a tensor.

    Args:
        shape: Its shape.
        fields: Its fields. Along a dimension that none of them varies along, the tensor is rigid: no position of it may be
            removed.
        constant: Whether it was made by a factory and fits whatever size it meets (zeros, ones).
        weight: Whether it was computed from parameters alone.
        when_used: What has to happen once an operator uses the tensor: positions of what it was computed from are united
            only then, since nothing depends on what is thrown away (the mean of attention weights over heads).
    """

    shape: tuple[int, ...]
    fields: list[Field] = field(default_factory=list)
    constant: bool = False
    weight: bool = False
    when_used: list[Callable[[], object]] = field(default_factory=list)


def varies(labels: Field) -> tuple[int, ...]:
    """The dimensions along which a field varies."""
    return tuple(d for d, size in enumerate(labels.shape) if size > 1)


def compress(labels: Tensor) -> Field:
    """The field with size 1 in every dimension along which it is constant."""
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1:
            first = labels.narrow(dim, 0, 1)
            if torch.equal(labels.select(dim, 0), labels.select(dim, -1)) and bool((labels == first).all()):
                labels = first
    return labels


def lift(labels: Field, rank: int) -> Field:
    """The field of a tensor with leading dimensions of size 1 added."""
    return labels.reshape((1,) * (rank - labels.dim()) + tuple(labels.shape))


def only_varying(fields: Iterable[Field]) -> list[Field]:
    """The fields without those that are the same everywhere."""
    return [f for f in fields if f.numel() > 1]


class Rules:
    """What rules for operators share: uniting, collapsing and freezing of fields.

    Args:
        labels: The labels.
        reason: Called for the number of the reason (operator and module) why something collapses now.
    """

    def __init__(self, labels: Labels, reason: Callable[[], int]) -> None:
        self.labels = labels
        self.reason = reason
        self.collapsed: list[tuple[int, int]] = []

    def collapse(self, labels: Field, dims: Collection[int]) -> Field:
        """Unite all labels that differ only in ``dims``; the field no longer varies along them."""
        for dim in dims:
            if labels.shape[dim] > 1:
                first = labels.narrow(dim, 0, 1)
                self.labels.unite(labels, first)
                self.collapsed.append((int(first.flatten()[0]), self.reason()))
                labels = first
        return labels

    def freeze(self, labels: Field) -> None:
        """Let all positions of a field stay."""
        self.labels.freeze(labels, self.reason())

    def fresh(self, shape: Sequence[int]) -> Tensor:
        """New labels of positions that have to stay."""
        size = 1
        for length in shape:
            size *= length
        labels = self.labels.new(size)
        self.freeze(labels)
        return labels.view(tuple(shape))

    def rigid(self, value: Value) -> None:
        """Nothing that the value belongs to may be removed by parts."""
        for labels in value.fields:
            self.freeze(self.collapse(labels, varies(labels)))

    def merge(self, values: Sequence[Value], shape: Sequence[int]) -> list[Field]:
        """The fields of what is computed element by element from several values.

        Args:
            values: The inputs.
            shape: The shape that all are broadcast to.
        """
        rank = len(shape)
        merged: list[Field] = []
        sizes: tuple[int, ...] = (1,) * rank
        for value in values:
            if value.constant:
                continue
            fields = [lift(f, rank) for f in value.fields]
            own = (1,) * (rank - len(value.shape)) + tuple(value.shape)
            merged = self._merge_two(merged, sizes, fields, own)
            sizes = tuple(max(a, b) for a, b in zip(sizes, own, strict=True))
        return merged

    def _merge_two(
        self, first: list[Field], first_sizes: Sequence[int], second: list[Field], second_sizes: Sequence[int]
    ) -> list[Field]:
        first = [self._fit(f, second, second_sizes) for f in first]
        second = [self._fit(f, first, first_sizes) for f in second]
        # what was fitted to fields that were themselves fitted since
        first = [self._fit(f, second, second_sizes) for f in only_varying(first)]
        result: list[Field] = []
        for labels in only_varying([*first, *second]):
            same = next((r for r in result if r.shape == labels.shape), None)
            if same is None:
                result.append(labels)
            else:
                self.labels.unite(same, labels)
        return result

    def _fit(self, labels: Field, others: Sequence[Field], sizes: Sequence[int]) -> Field:
        """The field once it has met an operand with some fields and sizes, element by element.

        Where both vary along the same dimensions, nothing is lost. Otherwise the field keeps its first dimension (heads
        come before the features of a head), and what the other operand says of the rest stays whole.
        """
        own = varies(labels)
        meets = [d for d in own if sizes[d] > 1]
        if not meets:
            return labels
        over = [f for f in others if set(varies(f)) & set(own)]
        if any(varies(f) == own for f in over):
            return labels
        labelled = {d for f in over for d in varies(f)}
        if own[0] in labelled or own[0] not in meets:
            keep = own[0]
            for other in over:
                if keep not in varies(other):
                    self.freeze(self.collapse(other, varies(other)))
            dims = [d for d in own if d != keep] if keep in labelled else [d for d in meets if d != keep]
            return self.collapse(labels, dims)
        # rigid along the first dimension
        labels = self.collapse(labels, [d for d in meets if d not in labelled])
        return self._fit(labels, others, sizes) if labels.numel() > 1 else labels
