"""Tokens of massive values do not decide the weights that all other tokens are computed with."""

from __future__ import annotations

import copy

import pytest
import torch

from lit_prune import PruningConfig, prune
from lit_prune.repair.equations import Equations
from lit_prune.repair.influence import influence
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


@pytest.mark.parametrize("shape", [(3, 8, 6), (3, 4, 2, 6), (1, 8, 6)])
@pytest.mark.parametrize("padded", [False, True])
def test_sequences_may_lie_along_another_dimension(shape, padded):
    wanted = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    wanted[:, 0] *= 100
    mask = torch.ones(shape[:-1], dtype=torch.bool)
    mask[-1, -1] = not padded
    found = influence(wanted.transpose(0, 1), mask.transpose(0, 1), 1)
    assert torch.equal(found.transpose(0, 1), influence(wanted, mask))
    assert (found[0] < 0.5).all()


@pytest.mark.parametrize("shape", [(0, 8, 6), (2, 0, 6), (0, 0, 6), (2, 0, 3, 6)])
def test_a_call_without_tokens_has_no_influence(shape):
    assert influence(torch.zeros(shape), None).shape == (*shape[:-1], 1)


@pytest.mark.parametrize("mask", [None, torch.arange(8).ge(3).repeat(4, 1)])
def test_influence_is_computed_in_runs_that_are_deterministic(mask):
    """On the device ``meta``, which refuses what CUDA refuses then."""
    wanted = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(0))
    wanted[:, 5] *= 100
    lengths = wanted.norm(dim=-1)
    counted = lengths if mask is None else lengths[mask].view(4, -1)
    expected = (3 * counted.median(dim=1, keepdim=True).values / lengths).clamp_max(1)
    torch.testing.assert_close(influence(wanted, mask)[..., 0], expected)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        influence(wanted.to("meta"), None if mask is None else mask.to("meta"))
    finally:
        torch.use_deterministic_algorithms(before)


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


class Attention(torch.nn.Module):
    """Attention and a feed-forward layer on token vectors of shape ``(batch, tokens, 16)``, inside of either layout."""

    def __init__(self, batch_first):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=batch_first)
        self.up, self.down = torch.nn.Linear(16, 64), torch.nn.Linear(64, 16)
        self.batch_first = batch_first

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.down(torch.relu(self.up(x + 0 * self.attention(x, x, x, need_weights=False)[0])))
        return x if self.batch_first else x.transpose(0, 1)


@pytest.mark.parametrize("samples", [1, 4])
def test_tokens_count_alike_whichever_layout_a_traced_model_has(samples):
    batches = [torch.randn(samples, 64, 16, generator=torch.Generator().manual_seed(n)) for n in range(8)]
    for x in batches:
        x[:, 0] *= 300
    found = []
    for batch_first in (True, False):
        torch.manual_seed(0)
        model = Attention(batch_first)
        prune(
            model,
            batches,
            lambda x, model=model: model(x)[:, 1:].square().mean(),
            PruningConfig(pruning_ratio=0.3, importance="magnitude", repair="least_squares", iterations=1),
        )
        found.append(model(torch.cat(batches)[:, 1:]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("samples", [1, 4])
def test_tokens_count_alike_whichever_layout_an_encoder_of_torch_has(samples):
    batches = [torch.randn(samples, 32, 16, generator=torch.Generator().manual_seed(n)) for n in range(8)]
    for x in batches:
        x[:, 0] = 8 * torch.eye(16)[0]
    found = []
    for batch_first in (True, False):
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(16, 2, 64, 0.0, batch_first=batch_first, norm_first=True)
        model = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
        with torch.no_grad():
            # one feature alone is large, where the first token is
            model.layers[0].linear1.weight[0] = 100 * torch.eye(16)[0]
            model.layers[0].linear1.bias[0] = -300.0
            model.layers[0].linear2.weight[:, 0] *= 10

        def run(x, model=model, batch_first=batch_first):
            return model(x) if batch_first else model(x.transpose(0, 1)).transpose(0, 1)

        config = PruningConfig(pruning_ratio=0.2, importance="magnitude", repair="least_squares", iterations=1)
        prune(model, batches, lambda x, run=run: run(x).square().mean(), config)
        found.append(run(torch.cat(batches)))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
