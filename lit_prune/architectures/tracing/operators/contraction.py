"""Products that sum over a dimension: matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lit_prune.architectures.tracing.fields import Field, Value, only_varying, varies
from lit_prune.architectures.tracing.operators.normalization import in_groups
from lit_prune.architectures.tracing.rules import Call, output, rule

NEW = None
"""A dimension that the operand does not have."""


def contract(call: Call, first: Value, second: Value, dims: tuple[Sequence[int | None], ...], summed: int) -> Value:
    """What is known of a product that sums over one dimension.

    Args:
        call: The call.
        first: One operand.
        second: The other.
        dims: For each operand, which of its dimensions lies at each dimension of the product before the sum; ``None`` if
            it has none there.
        summed: The dimension of the product that is summed over.

    Returns:
        The value without the dimension that was summed over; its shape is that of the fields only.
    """
    placed = [_placed(v, d) for v, d in zip((first, second), dims, strict=True)]
    for one, other in (placed, placed[::-1]):
        if one.weight and not other.weight:
            call.tracer.reads(one, summed, other)
    shape = [max(a, b) for a, b in zip(placed[0].shape, placed[1].shape, strict=True)]
    merged = call.rules.merge(placed, shape)
    fields = []
    for labels in merged:
        if varies(labels) == (summed,):
            continue
        fields.append(call.rules.collapse(labels, [summed]).squeeze(summed))
    if not any(v.weight for v in placed):
        side_by_side = [d for d in range(len(shape)) if all(v.shape[d] > 1 for v in placed) and d != summed]
        met = [f for f in merged if set(varies(f)) & set(side_by_side)]
        call.tracer.met([call.rules.collapse(f, [summed]) for f in met])
    del shape[summed]
    weight = all(v.weight or v.constant for v in placed) and any(v.weight for v in placed)
    return Value(tuple(shape), only_varying(fields), all(v.constant for v in placed), weight)


def _placed(value: Value, dims: Sequence[int | None]) -> Value:
    def place(sizes: Sequence[int]) -> list[int]:
        return [1 if d is None else sizes[d] for d in dims]

    order = [d for d in dims if d is not None]
    fields = [f.permute(order).reshape(place(f.shape)) for f in value.fields]
    return Value(tuple(place(value.shape)), fields, value.constant, value.weight)


def _finished(call: Call, product: Value, *added: Tensor) -> list[Value]:
    result = call.results()[0]
    values = [product, *(call.tracer.value(t) for t in added)]
    fields = product.fields if not added else call.rules.merge(values, result.shape)
    return [output(result, fields, values)]


@rule("mm")
def _mm(call: Call) -> list[Value]:
    first, second = (call.tracer.value(t) for t in call.args[:2])
    return _finished(call, contract(call, first, second, ((0, 1, NEW), (NEW, 0, 1)), 1))


@rule("addmm", "_addmm_activation")
def _addmm(call: Call) -> list[Value]:
    first, second = (call.tracer.value(t) for t in call.args[1:3])
    return _finished(call, contract(call, first, second, ((0, 1, NEW), (NEW, 0, 1)), 1), call.args[0])


@rule("bmm")
def _bmm(call: Call) -> list[Value]:
    first, second = (call.tracer.value(t) for t in call.args[:2])
    return _finished(call, contract(call, first, second, ((0, 1, 2, NEW), (0, NEW, 1, 2)), 2))


@rule("baddbmm")
def _baddbmm(call: Call) -> list[Value]:
    first, second = (call.tracer.value(t) for t in call.args[1:3])
    return _finished(call, contract(call, first, second, ((0, 1, 2, NEW), (0, NEW, 1, 2)), 2), call.args[0])


@rule("mv")
def _mv(call: Call) -> list[Value]:
    first, second = (call.tracer.value(t) for t in call.args[:2])
    return _finished(call, contract(call, first, second, ((0, 1), (NEW, 0)), 1))


@rule("addmv")
def _addmv(call: Call) -> list[Value]:
    first, second = (call.tracer.value(t) for t in call.args[1:3])
    return _finished(call, contract(call, first, second, ((0, 1), (NEW, 0)), 1), call.args[0])


@rule("dot")
def _dot(call: Call) -> list[Value]:
    first, second = (call.tracer.value(t) for t in call.args[:2])
    return _finished(call, contract(call, first, second, ((0,), (0,)), 0))


@rule("convolution", "_convolution", "mkldnn_convolution")
def _convolution(call: Call) -> list[Value]:
    value, weight = (call.tracer.value(t) for t in call.args[:2])
    bias, transposed, groups = call.args[2], bool(call.args[6]), int(call.args[8])
    unbatched = len(value.shape) < len(weight.shape)
    if unbatched:
        value = Value((1, *value.shape), [f.unsqueeze(0) for f in value.fields], value.constant, value.weight)
    rank = len(value.shape)
    spatial = range(2, rank)
    value = Value(value.shape, [_flat(call, f, spatial) for f in value.fields], value.constant, value.weight)
    weight = Value(weight.shape, [_flat(call, f, spatial) for f in weight.fields], weight.constant, weight.weight)
    product = _product(call, value, weight, transposed, groups)
    fields = [f.reshape(*f.shape[:2], *(1,) * (rank - 2)) for f in product.fields]
    result = call.results()[0]
    shape = tuple(result.unsqueeze(0).shape) if unbatched else tuple(result.shape)
    values = [Value(shape, fields, weight=product.weight)]
    if bias is not None:
        of_bias = call.tracer.value(bias)
        lifted = [f.reshape(1, -1, *(1,) * (rank - 2)) for f in of_bias.fields]
        values.append(Value((1, *of_bias.shape, *(1,) * (rank - 2)), lifted, of_bias.constant, of_bias.weight))
    merged = call.rules.merge(values, shape)
    return [output(result, [f.squeeze(0) for f in merged] if unbatched else merged, values)]


def _flat(call: Call, labels: Field, spatial: Sequence[int]) -> Field:
    """The field once a kernel has mixed what lies along the dimensions of space."""
    return call.rules.collapse(labels, [d for d in spatial if labels.shape[d] > 1])


def _matrix(value: Value) -> Value:
    fields = [f.reshape(f.shape[:2]) for f in value.fields]
    return Value(value.shape[:2], fields, value.constant, value.weight)


def _dense(call: Call, value: Value, weight: Value, transposed: bool) -> Value:
    """Dimensions of the product: batch, output channels, input channels."""
    produced, read = (1, 0) if transposed else (0, 1)
    return contract(call, _matrix(value), _matrix(weight), ((0, NEW, 1), (NEW, produced, read)), 2)


def _product(call: Call, value: Value, weight: Value, transposed: bool, groups: int) -> Value:
    if groups == 1:
        return _dense(call, value, weight, transposed)
    return _grouped(call, value, weight, transposed, groups)


def _grouped(call: Call, value: Value, weight: Value, transposed: bool, groups: int) -> Value:
    """All channels of one group of the convolution, read and produced, are united; single ones where it is depthwise."""
    value, weight = _matrix(value), _matrix(weight)
    read = [in_groups(call, f, 1, groups) for f in value.fields]
    inside = value.shape[1] // groups
    outside = weight.shape[1] if transposed else weight.shape[0] // groups
    own = [in_groups(call, f, 0, groups) for f in weight.fields if f.shape[0] > 1]
    for labels in weight.fields:
        if labels.shape[1] > 1:
            # the same for all groups of the convolution
            call.rules.freeze(labels)
    from_input = [_first_of_each(f, 1, inside) for f in read]
    from_weight = [_first_of_each(f, 0, inside if transposed else outside).T[:1] for f in own]
    joined = call.rules.merge(
        [
            Value((value.shape[0], groups), only_varying(from_input), value.constant, value.weight),
            Value((1, groups), only_varying(from_weight), weight.constant, weight.weight),
        ],
        (value.shape[0], groups),
    )
    fields = [f.repeat_interleave(outside, dim=1) if f.shape[1] > 1 else f for f in joined]
    return Value((value.shape[0], groups * outside), fields, weight=value.weight and weight.weight)


def _first_of_each(labels: Field, dim: int, size: int) -> Field:
    if labels.shape[dim] == 1:
        return labels
    return labels.unflatten(dim, (-1, size)).select(dim + 1, 0)
