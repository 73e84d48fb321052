"""Rules for operators that no small model on a CPU calls, and the arithmetic of labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lit_prune.architectures.tracing.labels import Labels
from lit_prune.architectures.tracing.mode import LabelTracer
from lit_prune.architectures.tracing.rules import RULES, Call


@pytest.mark.parametrize(("name", "cell", "gates"), [("lstm", nn.LSTMCell, 4), ("gru", nn.GRUCell, 3)])
def test_the_gates_of_a_fused_cell_belong_to_their_hidden_unit(name, cell, gates):
    module = cell(5, 6)
    tracer = LabelTracer(module)
    x = torch.randn(2, 5)
    with torch.no_grad(), tracer:
        state = torch.zeros(2, 6)
        of_input, of_state = x @ module.weight_ih.T, state @ module.weight_hh.T
    operator = getattr(torch.ops.aten, f"_thnn_fused_{name}_cell")
    results = [torch.zeros(2, 6) for _ in range(2 if name == "lstm" else 1)] + [torch.zeros(2, gates * 6)]
    call = Call(tracer, operator.default, (of_input, of_state, state, module.bias_ih, module.bias_hh), {}, results)
    values = RULES[f"_thnn_fused_{name}_cell"](call)
    classes = tracer.labels.classes()
    by_name = {(a.name, a.dim): classes[a.start : a.start + a.size] for a in tracer.labels.atoms}
    units = by_name["weight_ih", 0].reshape(gates, 6)
    assert (units == units[0]).all() and len(set(units[0])) == 6
    for parameter in ("weight_hh", "bias_ih", "bias_hh"):
        np.testing.assert_array_equal(by_name[parameter, 0].reshape(gates, 6), units)
    assert [f.shape for f in values[0].fields] == [(1, 6)]


def test_classes_are_the_connected_components():
    generator = torch.Generator().manual_seed(0)
    labels = Labels()
    labels.new(60)
    pairs = torch.randint(0, 60, (35, 2), generator=generator)
    reach = torch.eye(60, dtype=torch.bool)
    for a, b in pairs.tolist():
        labels.unite(torch.tensor([a]), torch.tensor([b]))
        reach[a, b] = reach[b, a] = True
    for _ in range(6):
        reach = (reach.float() @ reach.float()) > 0
    expected = reach.float().argmax(dim=1).numpy()
    np.testing.assert_array_equal(labels.classes(), expected)


def test_rows_that_lose_the_same_number_are_left_alone_and_others_are_united():
    labels = Labels()
    rows = labels.new(8).view(2, 4)
    labels.unite(rows[0], rows[1].roll(1))
    labels.balance(rows, or_rows=False)
    labels.settle()
    assert len(set(labels.classes())) == 4
    labels = Labels()
    rows = labels.new(8).view(2, 4)
    labels.balance(rows, or_rows=False)
    labels.settle()
    assert labels.classes().tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    labels = Labels()
    heads = labels.new(8).view(2, 4)
    labels.unite(heads, heads[:, :1])
    labels.balance(heads, or_rows=True)
    labels.settle()
    assert labels.classes().tolist() == [0] * 4 + [4] * 4
