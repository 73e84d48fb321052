"""Tokens of massive values do not decide the weights that all other tokens are computed with."""

from __future__ import annotations

import pytest
import torch

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
