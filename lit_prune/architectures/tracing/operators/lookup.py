"""Operators that read or write at positions given by an index."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_prune.architectures.tracing.fields import Field, Value, compress, varies
from lit_prune.architectures.tracing.rules import Call, normal, output, rule


def _without(call: Call, labels: Field, dims: list[int]) -> Field:
    """The field once positions along ``dims`` are read by index: those have to stay."""
    if any(labels.shape[d] > 1 for d in dims):
        labels = call.rules.collapse(labels, dims)
        call.rules.freeze(labels) if not varies(labels) else None
    return labels


@rule("embedding")
def _embedded(call: Call) -> list[Value]:
    weight, indices = call.tracer.value(call.args[0]), call.args[1]
    fields = []
    for labels in weight.fields:
        if labels.shape[0] > 1:
            call.rules.freeze(labels)
        if labels.shape[1] > 1:
            fields.append(call.rules.collapse(labels, [0]).reshape(*(1,) * indices.dim(), -1))
    return [output(r, fields, [Value(())]) for r in call.results()]


@rule("index", "_unsafe_index")
def _indexed(call: Call) -> list[Value]:
    value = call.tracer.value(call.args[0])
    indices = call.args[1]
    masked = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices)
    dims: list[int] = []
    at = 0
    for index in indices:
        width = index.dim() if isinstance(index, Tensor) and index.dtype == torch.bool else 1
        if isinstance(index, Tensor):
            dims += range(at, at + width)
        at += width
    fields = []
    for labels in value.fields:
        labels = _without(call, labels, dims)
        if masked:
            rest = [s for d, s in enumerate(labels.shape) if d not in dims]
            # several dimensions became one, at the place of the first
            fields.append(labels.reshape(*rest[: dims[0]], 1, *rest[dims[0] :]))
        else:
            # labels are in the memory of the CPU
            places = [i.cpu() if isinstance(i, Tensor) else i for i in indices]
            moved = call.operator(labels.expand(value.shape), places, **call.kwargs)
            fields.append(compress(moved))
    return [output(r, fields, [value]) for r in call.results()]


@rule("index_select")
def _selected(call: Call) -> list[Value]:
    value = call.tracer.value(call.args[0])
    dim = normal(call.args[1], len(value.shape))
    fields = [_without(call, f, [dim]) for f in value.fields]
    return [output(r, fields, [value]) for r in call.results()]


@rule("gather", "take_along_dim")
def _gathered(call: Call) -> list[Value]:
    value = call.tracer.value(call.args[0])
    rank = len(value.shape)
    dim = normal(call.argument(1, "dim"), rank)
    result = call.results()[0]
    fields = []
    for labels in value.fields:
        cut = [d for d in range(rank) if d == dim or (labels.shape[d] > 1 and result.shape[d] != labels.shape[d])]
        fields.append(_without(call, labels, cut))
    return [output(r, fields, [value]) for r in call.results()]


@rule("index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")
def _put(call: Call) -> list[Value]:
    value, source = call.tracer.value(call.args[0]), call.tracer.value(call.args[2])
    rank = len(value.shape)
    dims: list[int] = []
    at = 0
    for index in call.args[1]:
        width = index.dim() if isinstance(index, Tensor) and index.dtype == torch.bool else 1
        if isinstance(index, Tensor):
            dims += range(at, at + width)
        at += width
    trailing = rank - (max(dims) + 1 if dims else 0)
    fields = [_without(call, f, dims) for f in value.fields]
    target = Value(value.shape, fields, value.constant)
    return _written(call, target, source, trailing)


def _written(call: Call, target: Value, source: Value, trailing: int) -> list[Value]:
    """Fields of what is written at positions given by an index, of which the last dimensions stay as they are."""
    rank, own = len(target.shape), len(source.shape)
    kept = []
    for labels in source.fields:
        lost = [d for d in varies(labels) if d < own - trailing]
        labels = call.rules.collapse(labels, lost)
        kept.append(labels.reshape(*(1,) * (rank - trailing), *labels.shape[own - trailing :]) if trailing else labels)
    if not trailing:
        return [output(r, target.fields, [target]) for r in call.results()]
    shape = (*target.shape[: rank - trailing], *source.shape[own - trailing :])
    merged = call.rules.merge([target, Value(shape, kept, source.constant)], target.shape)
    return [output(r, merged, [target, source]) for r in call.results()]


@rule("scatter", "scatter_", "scatter_add", "scatter_add_", "index_add", "index_add_", "index_copy", "index_copy_")
def _scattered(call: Call) -> list[Value]:
    value = call.tracer.value(call.args[0])
    dim = normal(call.args[1], len(value.shape))
    target = Value(value.shape, [_without(call, f, [dim]) for f in value.fields], value.constant)
    source = call.args[3]
    if not isinstance(source, Tensor):
        return [output(r, target.fields, [target]) for r in call.results()]
    value = call.tracer.value(source)
    fields = [call.rules.collapse(f, [dim]) for f in value.fields]
    shape = tuple(1 if d == dim else s for d, s in enumerate(value.shape))
    merged = call.rules.merge([target, Value(shape, fields, value.constant)], target.shape)
    return [output(r, merged, [target, value]) for r in call.results()]
