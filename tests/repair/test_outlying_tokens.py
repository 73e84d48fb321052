"""Tokens of massive values do not decide the weights that all other tokens are computed with."""

from __future__ import annotations

import copy

import pytest
import torch

from lit_prune import PruningConfig, prune
from lit_prune.repair.equations import Equations
from lit_prune.repair.normal_equations import NormalEquations
from lit_prune.repair.regression import ridge


@pytest.mark.parametrize("times", [30.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_long_rows_do_not_decide_the_weights(times, dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 64, 8, generator=generator).to(dtype)
    true, other = (torch.randn(6, 8, generator=generator) for _ in range(2))
    wanted = inputs.float() @ true.T
    # the first token of each sequence follows another rule
    wanted[:, 0] = times * (inputs[:, 0].float() @ other.T)
    equations = NormalEquations()
    # the median is that of a sequence, so that sequences may come in any batches
    equations.add(inputs[:1], wanted[:1], None)
    equations.add(inputs[1:], wanted[1:], None)
    gram, cross, tokens = equations.reduced(None)
    found = ridge(gram, cross, torch.zeros(6, 8), 1e-3)
    assert tokens == 256
    assert (found - true).norm() < 0.25 * true.norm()
    x, y = inputs.flatten(0, 1).float(), wanted.flatten(0, 1)
    plain = ridge(x.T @ x, y.T @ x, torch.zeros(6, 8), 1e-3)
    assert (plain - true).norm() > 0.5 * true.norm()


@pytest.mark.parametrize("mask", [None, torch.arange(64) < 40])
def test_rows_of_like_length_count_as_they_are(mask):
    generator = torch.Generator().manual_seed(0)
    inputs, wanted = torch.randn(64, 8, generator=generator), torch.randn(64, 6, generator=generator)
    equations = NormalEquations()
    equations.add(inputs[None], wanted[None], None if mask is None else mask[None])
    gram, cross, _ = equations.reduced(None)
    rows = slice(None) if mask is None else mask
    torch.testing.assert_close(gram.triu(), (inputs[rows].T @ inputs[rows]).triu())
    torch.testing.assert_close(cross, wanted[rows].T @ inputs[rows])


@pytest.mark.parametrize("with_bias", [False, True])
def test_rows_of_a_traced_layer_count_by_their_influence(with_bias):
    """Against weighted least squares by QR of the rows with a column of ones."""
    generator = torch.Generator().manual_seed(0)
    inputs, wanted = torch.randn(200, 8, generator=generator), torch.randn(200, 6, generator=generator) + 2
    scale = torch.rand(200, 1, generator=generator) + 0.1
    layer = torch.nn.Linear(8, 6, bias=with_bias)
    equations = Equations(8, 6, layer)
    equations.add(inputs[:50], wanted[:50], scale[:50])
    equations.add(inputs[50:], wanted[50:], scale[50:])
    weight, shift = equations.solve(layer.weight.detach(), layer.bias, 1e-6)
    columns = torch.cat([inputs, torch.ones(200, int(with_bias))], dim=1)
    expected = torch.linalg.lstsq(columns * scale, wanted * scale).solution.T
    torch.testing.assert_close(weight, expected[:, :8], atol=1e-3, rtol=1e-3)
    if with_bias:
        torch.testing.assert_close(shift, expected[:, 8], atol=1e-3, rtol=1e-3)


class Feedforward(torch.nn.Module):
    """A feed-forward layer of no known architecture, on token vectors of shape ``(batch, tokens, 16)``."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 64), torch.nn.Linear(64, 16)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("times", [100.0, 1000.0])
def test_a_traced_model_keeps_what_it_does_with_common_tokens(times):
    torch.manual_seed(0)
    model = Feedforward()
    batches = [torch.randn(4, 64, 16) for _ in range(4)]
    for x in batches:
        x[:, 0] *= times
    with torch.no_grad():
        dense = torch.cat([model(x)[:, 1:] for x in batches])
    errors = {}
    for repair in (None, "least_squares"):
        pruned = copy.deepcopy(model)
        prune(
            pruned,
            batches,
            lambda x, pruned=pruned: pruned(x)[:, 1:].square().mean(),
            PruningConfig(pruning_ratio=0.3, importance="magnitude", repair=repair, iterations=1, compensation=False),
        )
        with torch.no_grad():
            errors[repair] = (torch.cat([pruned(x)[:, 1:] for x in batches]) - dense).norm()
    assert errors["least_squares"] < 0.7 * errors[None]
