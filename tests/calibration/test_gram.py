"""Products of rows against float64, and how much memory they and the solves take."""

from __future__ import annotations

import pytest
import torch
from allocations import Allocations

from lit_prune.calibration import gram as grams
from lit_prune.calibration.gram import Gram, add_product
from lit_prune.repair.equations import Equations
from lit_prune.repair.regression import ridge, unexplained_share

HALF = [torch.bfloat16, torch.float16]


def rows(count, width, dtype, seed=0):
    values = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 37, 256, 700])
def test_sums_of_products_are_those_of_float64(dtype, width):
    gram = Gram(width, torch.device("cpu"), torch.promote_types(dtype, torch.float32))
    cross = torch.zeros(5, width, dtype=gram.matrix.dtype)
    expected, expected_cross = 0, 0
    for seed in range(3):
        # several pieces of rows where they are made wider
        x = rows(1500, width, dtype, seed)
        y = rows(1500, 5, torch.float32, 10 + seed)
        gram.add(x)
        # reading the sum between two additions does not spoil it
        assert torch.equal(gram.matrix, gram.matrix.T)
        add_product(cross, y, x)
        expected = expected + x.double().T @ x.double()
        expected_cross = expected_cross + y.double().T @ x.double()
    scale = expected.diagonal().max()
    assert gram.matrix.dtype == torch.promote_types(dtype, torch.float32)
    # float32 adds up to 4500 products; in 16 bits the error would be more than a hundred times larger
    assert float((gram.matrix.double() - expected).abs().max() / scale) < 2e-5
    assert float((cross.double() - expected_cross).abs().max() / scale) < 2e-5


@pytest.mark.parametrize("dtype", HALF)
def test_products_are_exact_under_autocast_and_a_default_dtype_of_16_bits(dtype):
    x = rows(300, 64, torch.float32)
    outside, within = (Gram(64, x.device, torch.float32) for _ in range(2))
    outside.add(x)
    torch.set_default_dtype(dtype)
    try:
        with torch.autocast("cpu", dtype=dtype):
            within.add(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(outside.matrix, within.matrix)


def test_padding_adds_nothing_even_if_it_is_not_finite():
    values, mask = rows(12, 5, torch.float32).view(3, 4, 5).clone(), torch.ones(3, 4, dtype=torch.bool)
    mask[1, 2:], mask[2] = False, False
    values[2] = torch.nan
    found, count = grams.real_rows(values, mask)
    assert int(count) == 6 and found.shape == (12, 5)
    torch.testing.assert_close(found.T @ found, values[mask].T @ values[mask])
    for other in (None, torch.ones(12, dtype=torch.bool)):
        assert grams.real_rows(values, other)[1] == 12


def test_a_cpu_makes_rows_wider_and_the_meta_device_multiplies_them_as_they_are():
    assert not grams.multiplies_into_float32(torch.device("cpu"), torch.bfloat16)
    assert grams.multiplies_into_float32(torch.device("meta"), torch.bfloat16)
    gram = Gram(3000, torch.device("meta"), torch.float32)
    x = torch.zeros(2048, 3000, dtype=torch.bfloat16, device="meta")
    with Allocations() as found:
        gram.add(x)
    # a strip at a time, and no wider copy of the rows
    assert found.peak == 4 * 1024 * 3000


def most(function, width, itemsize):
    """How many storages as large as a matrix of all pairs are alive at once, and all bytes over those of one in float32."""
    with Allocations(at_least=width * width * itemsize) as large, Allocations() as all_of_them:
        function()
    return large.peak_number, all_of_them.peak / (4 * width * width)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_a_gram_is_added_up_in_place(dtype):
    width = 1100
    x = rows(64, width, dtype)

    def add():
        gram = Gram(width, x.device, torch.float32)
        for _ in range(3):
            gram.add(x)
        return gram.matrix

    number, size = most(add, width, 4)
    assert number == 1 and size < 1.4


def test_a_solve_holds_the_system_beside_the_gram_and_no_third_matrix():
    width = 1800
    x = rows(40, width, torch.float32)
    gram = torch.eye(width) + x.T @ x
    cross, prior = rows(8, width, torch.float32, 1), rows(8, width, torch.float32, 2)
    # float64 beside the float32 that is there
    number, size = most(lambda: ridge(gram, cross, prior, 0.1), width, 4)
    assert number == 1 and size < 2.9
    index = torch.arange(width)[:, None]
    number, size = most(lambda: unexplained_share(gram, prior, index, 0.1), width, 4)
    # and a quarter, where the factor is read from its middle on
    assert number == 1 and size < 3.4


def test_an_input_that_is_always_the_same_keeps_its_weights():
    """What is left of it without its mean is rounding, which no weight is to be fitted to."""
    layer, x = torch.nn.Linear(20, 4), rows(3000, 20, torch.float32)
    x[:, 3] = 7.3
    equations = Equations(20, 4, layer)
    for piece in x.split(100):
        equations.add(piece, rows(len(piece), 4, torch.float32, 1))
    weight, _ = equations.solve(layer.weight.detach(), layer.bias.detach(), 1.0)
    assert float((weight - layer.weight)[:, 3].abs().max()) < 0.05
    assert float((weight - layer.weight)[:, 4].abs().max()) > 0.05


def test_equations_with_a_bias_are_centred_in_place():
    width = 1600
    layer = torch.nn.Linear(width, 4)
    x, y = rows(200, width, torch.float32), rows(200, 4, torch.float32, 1)

    def fit():
        equations = Equations(width, 4, layer)
        equations.add(x, y)
        return equations.solve(layer.weight.detach(), layer.bias.detach(), 1.0)

    number, _ = most(fit, width, 8)
    assert number == 2
