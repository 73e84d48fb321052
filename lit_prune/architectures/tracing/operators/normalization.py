"""Norms."""

from __future__ import annotations

from torch import Tensor

from lit_prune.architectures.tracing.fields import Value, varies
from lit_prune.architectures.tracing.rules import Call, output, rule


def _along(call: Call, tensor: Tensor | None, rank: int, dim: int) -> list[Value]:
    """A vector as a value of the rank of the input that lies along ``dim``."""
    if tensor is None:
        return []
    value = call.tracer.value(tensor)
    after = (1,) * (rank - dim - 1)
    fields = [f.reshape(*(1,) * dim, -1, *after) for f in value.fields]
    return [Value((*(1,) * dim, value.shape[0], *after), fields, value.constant, value.weight)]


def _first(call: Call, fields: list[Tensor], inputs: list[Value]) -> list[Value]:
    results = call.results()
    return [output(results[0], fields, inputs), *(Value(tuple(r.shape)) for r in results[1:])]


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def _over_last(call: Call) -> list[Value]:
    value = call.tracer.value(call.args[0])
    rank = len(value.shape)
    first = rank - len(call.args[1])
    fields = [call.rules.collapse(f, [d for d in varies(f) if d >= first]) for f in value.fields]
    inputs = [Value(value.shape, fields)]
    inputs += [call.tracer.value(t) for t in call.args[2:4] if isinstance(t, Tensor)]
    return _first(call, call.rules.merge(inputs, value.shape), inputs)


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_no_update",
    "_batch_norm_with_update",
    "batch_norm",
    "cudnn_batch_norm",
    "miopen_batch_norm",
)
def _over_batch(call: Call) -> list[Value]:
    value = call.tracer.value(call.args[0])
    rank = len(value.shape)
    fields = [call.rules.collapse(f, [d for d in varies(f) if d > 1]) for f in value.fields]
    inputs = [Value(value.shape, fields, value.constant)]
    for tensor in call.args[1:5]:
        inputs += _along(call, tensor if isinstance(tensor, Tensor) else None, rank, 1)
    return _first(call, call.rules.merge(inputs, value.shape), inputs)


@rule("native_group_norm")
def _over_groups(call: Call) -> list[Value]:
    value = call.tracer.value(call.args[0])
    rank = len(value.shape)
    groups = int(call.args[6])
    fields = []
    for labels in value.fields:
        labels = call.rules.collapse(labels, [d for d in varies(labels) if d > 1])
        fields.append(in_groups(call, labels, 1, groups))
    inputs = [Value(value.shape, fields)]
    for tensor in call.args[1:3]:
        inputs += _along(call, tensor, rank, 1)
    return _first(call, call.rules.merge(inputs, value.shape), inputs)


def in_groups(call: Call, labels: Tensor, dim: int, groups: int) -> Tensor:
    """The field whose positions along ``dim`` are united within each of some groups of equal size."""
    if labels.shape[dim] == 1:
        return labels
    split = labels.unflatten(dim, (groups, -1))
    size = split.shape[dim + 1]
    united = call.rules.collapse(split, [dim + 1])
    return united.expand(*split.shape[: dim + 1], size, *split.shape[dim + 2 :]).flatten(dim, dim + 1)


@rule("_weight_norm_interface")
def _weight_normed(call: Call) -> list[Value]:
    direction, length = (call.tracer.value(t) for t in call.args[:2])
    fields = call.rules.merge([direction, length], direction.shape)
    return _first(call, fields, [direction, length])


@rule("native_dropout", "_fused_dropout")
def _dropped(call: Call) -> list[Value]:
    value = call.tracer.value(call.args[0])
    return [output(r, value.fields, [value]) for r in call.results()]
