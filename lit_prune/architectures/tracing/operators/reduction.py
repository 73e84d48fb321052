"""Operators that mix the elements along some dimensions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor

from lit_prune.architectures.tracing.fields import Value, varies
from lit_prune.architectures.tracing.rules import Call, normal, output, rule

_ARGUMENTS = ("dim", "dims", "axis")


def _dims(call: Call, rank: int) -> list[int]:
    """The dimensions that are reduced; all if none are given."""
    schema = [a.name for a in call.operator._schema.arguments]
    for name in _ARGUMENTS:
        if name in schema:
            given = call.argument(schema.index(name), name)
            if given is None or given == []:
                return list(range(rank))
            return [normal(d, rank) for d in ([given] if isinstance(given, int) else given)]
    return list(range(rank))


def _reduced(call: Call, *, harmless: bool) -> list[Value]:
    value = call.tracer.value(call.args[0])
    rank = len(value.shape)
    dims = _dims(call, rank)
    results = []
    for result in call.results():
        fields = []
        when_used: list[Callable[[], object]] = []
        for labels in value.fields:
            own = [d for d in varies(labels) if d in dims]
            if own and harmless and tuple(own) == varies(labels):
                # zeros change neither a sum nor a norm
                continue
            if own:
                when_used.append(partial(call.rules.collapse, labels, own))
            for dim in own:
                labels = labels.narrow(dim, 0, 1)
            fields.append(_fitting(labels, result, dims))
        results.append(replace(output(result, fields, [value]), when_used=when_used))
    return results


def _fitting(labels: Tensor, result: Tensor, dims: list[int]) -> Tensor:
    if labels.dim() == result.dim():
        return labels
    return labels.reshape([s for d, s in enumerate(labels.shape) if d not in dims])


@rule("sum", "linalg_vector_norm", "norm")
def _summed(call: Call) -> list[Value]:
    return _reduced(call, harmless=call.tracer.value(call.args[0]).weight)


@rule(
    "mean",
    "amax",
    "amin",
    "max",
    "min",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "prod",
    "any",
    "all",
    "argmax",
    "argmin",
    "median",
    "nanmedian",
    "mode",
    "logsumexp",
    "_softmax",
    "_log_softmax",
    "_safe_softmax",
    "softmax",
    "log_softmax",
    "cumsum",
    "cumprod",
    "logcumsumexp",
    "sort",
    "argsort",
    "aminmax",
    "count_nonzero",
    "nansum",
    "kthvalue",
)
def _mixed(call: Call) -> list[Value]:
    return _reduced(call, harmless=False)


@rule("topk")
def _top(call: Call) -> list[Value]:
    value = call.tracer.value(call.args[0])
    dim = normal(call.argument(2, "dim", -1), len(value.shape))
    fields = [call.rules.collapse(f, [d for d in varies(f) if d == dim]) for f in value.fields]
    return [output(r, fields, [value]) for r in call.results()]


def _spatial(call: Call, first: int) -> list[Value]:
    value = call.tracer.value(call.args[0])
    fields = [call.rules.collapse(f, [d for d in varies(f) if d >= first]) for f in value.fields]
    return [output(r, fields, [value]) for r in call.results()]


@rule(
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_trilinear3d",
    "upsample_bicubic2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "grid_sampler_2d",
    "grid_sampler_3d",
)
def _pooled(call: Call) -> list[Value]:
    for tensor in call.tensors()[1:]:
        call.rules.rigid(call.tracer.value(tensor))
    kernel = {"max_pool1d": 1, "avg_pool1d": 1, "adaptive_avg_pool1d": 1}
    name = call.operator.overloadpacket.__name__
    spatial = kernel.get(name, 1 if "1d" in name else 3 if "3d" in name else 2)
    return _spatial(call, len(call.tracer.value(call.args[0]).shape) - spatial)


@rule("_fft_r2c", "_fft_c2c", "_fft_c2r")
def _transformed(call: Call) -> list[Value]:
    value = call.tracer.value(call.args[0])
    dims = {normal(d, len(value.shape)) for d in call.args[1]}
    fields = [call.rules.collapse(f, [d for d in varies(f) if d in dims]) for f in value.fields]
    return [output(r, fields, [value]) for r in call.results()]
