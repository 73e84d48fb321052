"""Operators that make tensors of one value (these fit whatever they meet), and those that only ask for something."""

from __future__ import annotations

from lit_prune.architectures.tracing.fields import Value
from lit_prune.architectures.tracing.rules import Call, rule


@rule(
    "zeros",
    "ones",
    "full",
    "empty",
    "empty_strided",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "new_empty_strided",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "scalar_tensor",
)
def _constant(call: Call) -> list[Value]:
    return [Value(tuple(r.shape), constant=True) for r in call.results()]


@rule("zero_", "fill_", "zero", "fill")
def _filled(call: Call) -> list[Value]:
    value = call.tracer.value(call.args[0])
    return [Value(tuple(r.shape), list(value.fields), constant=not value.fields) for r in call.results()]


@rule(
    "arange",
    "linspace",
    "eye",
    "rand",
    "randn",
    "randint",
    "randperm",
    "rand_like",
    "randn_like",
    "randint_like",
    "bernoulli",
    "bernoulli_",
    "normal_",
    "uniform_",
    "tril_indices",
    "triu_indices",
    "hann_window",
    "hamming_window",
)
def _data(call: Call) -> list[Value]:
    return [Value(tuple(r.shape)) for r in call.results()]


@rule(
    "_local_scalar_dense", "item", "is_nonzero", "equal", "is_same_size", "sym_size", "_assert_async", "_assert_scalar"
)
def _asked(call: Call) -> list[Value]:
    return [Value(tuple(r.shape)) for r in call.results()]
