"""Operators that move elements: the same operator moves their labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_prune.architectures.tracing.fields import Field, Value, compress, lift, only_varying, varies
from lit_prune.architectures.tracing.rules import Call, elementwise, normal, output, rule, unknown
from lit_prune.torch_internals import overload_name, tree_leaves


def _moved(call: Call, operate: Callable[[Tensor], Any]) -> list[Value]:
    value = call.tracer.value(call.args[0])
    fields: list[list[Field]] = [[] for _ in call.results()]
    for labels in value.fields:
        moved = [x for x in tree_leaves(operate(labels.expand(value.shape))) if isinstance(x, Tensor)]
        for found, part in zip(fields, moved, strict=True):
            found.append(compress(part))
    return [output(r, f, [value]) for r, f in zip(call.results(), fields, strict=True)]


@rule(
    "alias",
    "clone",
    "contiguous",
    "detach",
    "detach_",
    "lift_fresh",
    "lift",
    "to",
    "_to_copy",
    "_conj",
    "positive",
)
def _same(call: Call) -> list[Value]:
    value = call.tracer.value(call.args[0])
    return [Value(value.shape, list(value.fields), value.constant, value.weight) for _ in call.results()]


@rule("permute", "transpose", "t", "unsqueeze", "transpose_", "t_", "unsqueeze_")
def _reordered(call: Call) -> list[Value]:
    value = call.tracer.value(call.args[0])
    name = call.operator.overloadpacket.__name__.rstrip("_")
    operate = getattr(torch, name)
    fields = [operate(labels, *call.args[1:], **call.kwargs) for labels in value.fields]
    return [output(r, fields, [value]) for r in call.results()]


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "squeeze", "view_copy", "squeeze_")
def _reshaped(call: Call) -> list[Value]:
    # all of these keep the order of the elements
    if overload_name(call.operator) == "dtype":
        return _same(call)
    shape = tuple(call.results()[0].shape)
    value = call.tracer.value(call.args[0])
    fields: list[Field] = []
    # what comes first stays apart if dimensions are joined: heads, not the features of a head
    for labels in sorted(value.fields, key=lambda f: (not call.rules.labels.owners(f), varies(f))):
        moved = compress(labels.expand(value.shape).reshape(shape))
        if any(set(varies(moved)) & set(varies(f)) for f in fields) and not _met_before(labels, value.fields):
            call.rules.freeze(call.rules.collapse(labels, varies(labels)))
            continue
        if len(varies(labels)) < len(varies(moved)):
            _regular(call, moved)
        for dim in varies(moved):
            call.tracer.met_dimension(moved, dim, shape)
        fields.append(moved)
    call.tracer.met_shape(value.fields)
    return [output(r, fields, [value]) for r in call.results()]


def _met_before(labels: Field, fields: Sequence[Field]) -> bool:
    """Whether another field varies along a dimension of this one already."""
    return any(f is not labels and set(varies(f)) & set(varies(labels)) for f in fields)


def _regular(call: Call, labels: Field) -> None:
    """One dimension was split into several: what is removed has to leave a rectangle."""
    for dim in varies(labels)[:-1]:
        call.rules.labels.balance(labels.movedim(dim, 0).flatten(1), or_rows=True)


@rule("expand", "repeat", "tile", "expand_copy")
def _repeated(call: Call) -> list[Value]:
    value = call.tracer.value(call.args[0])
    result = call.results()[0]
    rank = result.dim()
    operate = torch.Tensor.expand if "expand" in call.operator.overloadpacket.__name__ else torch.Tensor.repeat
    call.tracer.met_shape(value.fields)
    moved = _moved(call, lambda x: operate(x, *call.args[1:2]))
    if not value.constant:
        # a new dimension is the same at all its positions, however many these are
        own = (1,) * (rank - len(value.shape)) + value.shape
        grown = [d for d in range(rank) if own[d] == 1 and result.shape[d] > 1]
        moved[0].fields.extend(_virtual(call, rank, d, result.shape[d]) for d in grown)
    return moved


def _virtual(call: Call, rank: int, dim: int, size: int) -> Field:
    return call.rules.labels.new(size).view([size if d == dim else 1 for d in range(rank)])


@rule("repeat_interleave")
def _interleaved(call: Call) -> list[Value]:
    if not isinstance(call.argument(1, "repeats"), int):
        for value in call.values():
            call.rules.rigid(value)
        return [Value(tuple(r.shape)) for r in call.results()]
    return _moved(call, lambda x: torch.repeat_interleave(x, *call.args[1:], **call.kwargs))


@rule("diagonal", "unfold", "movedim", "pixel_shuffle", "pixel_unshuffle", "tril", "triu")
def _generic(call: Call) -> list[Value]:
    name = call.operator.overloadpacket.__name__
    if name in ("tril", "triu"):
        value = call.tracer.value(call.args[0])
        fields = [call.rules.collapse(f, [d for d in varies(f) if d >= f.dim() - 2]) for f in value.fields]
        return [output(r, fields, [value]) for r in call.results()]
    return _moved(call, lambda x: call.operator(x, *call.args[1:], **call.kwargs))


@rule("as_strided")
def _strided(call: Call) -> list[Value]:
    source, result = call.args[0], call.results()[0]
    # in place, the argument has the new strides already
    if source is result:
        return _same(call) if call.tracer.value(source).shape == tuple(result.shape) else unknown(call)
    size = source.untyped_storage().nbytes() // source.element_size()

    def operate(labels: Tensor) -> Tensor:
        memory = torch.full((size,), -1)
        memory.as_strided(source.shape, source.stride(), source.storage_offset()).copy_(labels)
        return memory.as_strided(result.shape, result.stride(), result.storage_offset()).clone()

    value = call.tracer.value(source)
    if any(bool((operate(f.expand(value.shape)) < 0).any()) for f in value.fields):
        return unknown(call)
    return _moved(call, operate)


@rule("native_channel_shuffle", "channel_shuffle")
def _shuffled(call: Call) -> list[Value]:
    groups = call.argument(1, "groups")

    def operate(x: Tensor) -> Tensor:
        return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)

    for labels in call.tracer.value(call.args[0]).fields:
        if labels.shape[1] > 1:
            call.rules.labels.balance(labels.movedim(1, 0).flatten(1).reshape(groups, -1), or_rows=False)
    return _moved(call, operate)


@rule("select", "slice", "unbind", "split", "split_with_sizes", "narrow", "chunk", "unsafe_split", "unsafe_chunk")
def _parts(call: Call) -> list[Value]:
    name = call.operator.overloadpacket.__name__
    value = call.tracer.value(call.args[0])
    rank = len(value.shape)
    # unbind(x, dim), select(x, dim, index), slice(x, dim, ...), split(x, sizes, dim)
    dim = normal(call.argument(1 if name in ("select", "slice", "unbind", "narrow") else 2, "dim", 0), rank)
    whole = value.shape[dim]
    lengths = [1 if r.dim() < rank else r.shape[dim] for r in call.results()]
    for labels in value.fields:
        if labels.shape[dim] > 1 and lengths[0] not in (0, whole):
            starts = _start(call, name, whole)
            equal = whole % lengths[0] == 0 and starts % lengths[0] == 0 and len(set(lengths)) == 1
            if name in ("slice", "narrow"):
                # halves are meant to be equal; smaller parts may be of any kind (keys behind queries)
                equal = equal and whole == 2 * lengths[0]
            if equal:
                rows = labels.movedim(dim, 0).reshape(whole // lengths[0], -1)
                call.rules.labels.balance(rows, or_rows=False)
    call.tracer.met_shape(value.fields)
    if name in ("slice", "narrow"):
        start = _start(call, name, whole)
        for labels in value.fields:
            call.tracer.met_number(labels, dim, start)
            call.tracer.met_number(labels, dim, start + lengths[0])
    if name == "split_with_sizes":
        call.tracer.met_split(lengths, dim, value.fields)
    return _moved(call, lambda x: call.operator(x, *call.args[1:], **call.kwargs))


def _start(call: Call, name: str, whole: int) -> int:
    if name not in ("slice", "narrow"):
        return 0
    start = call.argument(2, "start") or 0
    step = call.argument(4, "step", 1) if name == "slice" else 1
    if step != 1:
        return 1
    return int(max(start + whole, 0) if start < 0 else start)


@rule("view_as_complex")
def _paired(call: Call) -> list[Value]:
    value = call.tracer.value(call.args[0])
    last = len(value.shape) - 1
    fields = [call.rules.collapse(f, [last]).squeeze(last) for f in value.fields]
    return [output(r, fields, [value]) for r in call.results()]


@rule("view_as_real")
def _unpaired(call: Call) -> list[Value]:
    value = call.tracer.value(call.args[0])
    return [output(r, [f.unsqueeze(-1) for f in value.fields], [value]) for r in call.results()]


@rule("roll", "flip")
def _shifted(call: Call) -> list[Value]:
    value = call.tracer.value(call.args[0])
    dims = call.argument(2, "dims", ()) if call.operator.overloadpacket.__name__ == "roll" else call.args[1]
    rank = len(value.shape)
    chosen = {normal(d, rank) for d in dims} or set(range(rank))
    fields = [call.rules.collapse(f, [d for d in varies(f) if d in chosen]) for f in value.fields]
    return [output(r, fields, [value]) for r in call.results()]


@rule("constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
def _padded(call: Call) -> list[Value]:
    return _pad(call)


@rule("replication_pad1d", "replication_pad2d", "replication_pad3d")
def _replicated(call: Call) -> list[Value]:
    return _pad(call)


def _pad(call: Call) -> list[Value]:
    value = call.tracer.value(call.args[0])
    pad = [int(p) for p in call.args[1]]
    rank = len(value.shape)
    fields = []
    sides = [(rank - 1 - i, pad[2 * i], pad[2 * i + 1]) for i in range(len(pad) // 2)]
    for labels in value.fields:
        for dim, before, after in sides:
            if labels.shape[dim] == 1 or not (before or after):
                continue
            if varies(labels) != (dim,) or before < 0 or after < 0:
                labels = call.rules.collapse(labels, [dim])
                continue
            shape = list(labels.shape)
            ends = [call.rules.fresh([*shape[:dim], n, *shape[dim + 1 :]]) for n in (before, after)]
            labels = torch.cat([ends[0], labels, ends[1]], dim)
        fields.append(labels)
    return [output(r, fields, [value]) for r in call.results()]


@rule("cat", "concat", "concatenate", "hstack", "vstack", "_cat")
def _concatenated(call: Call) -> list[Value]:
    result = call.results()[0]
    values = [call.tracer.value(t) for t in call.args[0] if t.numel()]
    dim = normal(call.argument(1, "dim", 0), result.dim())
    return [output(result, concatenate(call, values, dim), values)]


@rule("stack")
def _stacked(call: Call) -> list[Value]:
    result = call.results()[0]
    dim = normal(call.argument(1, "dim", 0), result.dim())
    values = []
    for tensor in call.args[0]:
        value = call.tracer.value(tensor)
        shape = (*value.shape[:dim], 1, *value.shape[dim:])
        values.append(Value(shape, [f.unsqueeze(dim) for f in value.fields], value.constant, value.weight))
    return [output(result, concatenate(call, values, dim), values)]


def concatenate(call: Call, values: Sequence[Value], dim: int) -> list[Field]:
    """The fields of values that are put side by side along a dimension."""
    rules = call.rules
    fields: list[Field] = []
    alike: list[Value] = [Value(_at(v.shape, dim, 1), [], v.constant) for v in values]
    # fields that agree about everything but the dimension itself belong together
    for key in dict.fromkeys(_without(f, dim) for v in values for f in v.fields):
        own = [[f for f in v.fields if _without(f, dim) == key] for v in values]
        for same in own:
            for extra in same[1:]:
                rules.labels.unite(*torch.broadcast_tensors(same[0], extra))
        if not any(f.shape[dim] > 1 for same in own for f in same):
            for value, same in zip(alike, own, strict=True):
                value.fields.extend(same[:1])
            continue
        example = next(same[0] for same in own if same)
        sizes = [s if d in key else 1 for d, s in enumerate(example.shape)]
        parts = []
        for value, same in zip(values, own, strict=True):
            wanted = _at(sizes, dim, value.shape[dim])
            parts.append(same[0].expand(wanted) if same else rules.fresh(wanted))
        fields.append(torch.cat(parts, dim))
    shape = [max(sizes) for sizes in zip(*(v.shape for v in alike), strict=True)]
    return [*only_varying(fields), *rules.merge(alike, shape)]


def _at(sizes: Sequence[int], dim: int, size: int) -> tuple[int, ...]:
    """Sizes with another one at ``dim``."""
    return (*sizes[:dim], size, *sizes[dim + 1 :])


def _without(labels: Field, dim: int) -> tuple[int, ...]:
    return tuple(d for d in varies(labels) if d != dim)


@rule("copy_", "copy")
def _copied(call: Call) -> list[Value]:
    target, source = (call.tracer.value(t) for t in call.args[:2])
    shape = call.results()[0].shape
    fields = [lift(f, len(shape)) for f in source.fields]
    if not target.fields or source.constant:
        # a position that is written once belongs to what was written
        return [Value(tuple(shape), only_varying(fields or target.fields), source.constant, source.weight)]
    return elementwise(call)


@rule("im2col")
def _unfolded(call: Call) -> list[Value]:
    value = call.tracer.value(call.args[0])
    kernel = math.prod(call.argument(1, "kernel_size"))
    rank = len(value.shape)
    fields = []
    for labels in value.fields:
        labels = call.rules.collapse(labels, [d for d in varies(labels) if d >= rank - 2]).squeeze(-1)
        fields.append(labels.repeat_interleave(kernel, dim=rank - 3) if labels.shape[rank - 3] > 1 else labels)
    return [output(r, fields, [value]) for r in call.results()]


@rule("col2im")
def _folded(call: Call) -> list[Value]:
    value = call.tracer.value(call.args[0])
    kernel = math.prod(call.argument(2, "kernel_size"))
    rank = len(value.shape)
    fields = []
    for labels in value.fields:
        labels = call.rules.collapse(labels, [d for d in varies(labels) if d == rank - 1])
        if labels.shape[rank - 2] > 1:
            labels = labels.unflatten(rank - 2, (-1, kernel))
            labels = call.rules.collapse(labels, [rank - 1]).squeeze(rank - 1)
        fields.append(labels.unsqueeze(-1))
    return [output(r, fields, [value]) for r in call.results()]


@rule("_pack_padded_sequence")
def _packed(call: Call) -> list[Value]:
    """Steps of sequences one behind the other; what of a step is a feature stays one."""
    value = call.tracer.value(call.args[0])
    fields = [call.rules.collapse(f, [d for d in varies(f) if d < 2]).squeeze(0) for f in value.fields]
    packed, *rest = call.results()
    return [output(packed, fields, [value]), *(Value(tuple(r.shape)) for r in rest)]
