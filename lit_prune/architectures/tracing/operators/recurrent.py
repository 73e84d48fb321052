"""The fused cells of recurrent layers, which GPUs run."""

from __future__ import annotations

from lit_prune.architectures.tracing.fields import Field, Value
from lit_prune.architectures.tracing.rules import Call, output, rule


@rule("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell")
def _fused_cell(call: Call) -> list[Value]:
    """The gates of one hidden unit belong together, and with the unit's state before."""
    values = call.values()
    state = values.pop(2)
    width = state.shape[-1]
    shape = (state.shape[0], values[0].shape[-1])
    gates = [_unit(call, f, width) for f in call.rules.merge(values, shape)]
    fields = call.rules.merge([Value(state.shape, gates), state], state.shape)
    inputs = [*values, state]
    results = call.results()
    states, workspace = results[:-1], results[-1]
    return [*(output(r, fields, inputs) for r in states), Value(tuple(workspace.shape))]


def _unit(call: Call, labels: Field, width: int) -> Field:
    if labels.shape[1] == 1:
        return labels
    return call.rules.collapse(labels.unflatten(1, (-1, width)), [1]).squeeze(1)
