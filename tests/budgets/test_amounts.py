"""Amounts and budgets as people write them."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from lit_prune.budgets.amounts import BYTE_UNITS, COUNT_UNITS, TIME_UNITS, parse_amount
from lit_prune.budgets.budget import Budget
from lit_prune.config import PruningConfig
from lit_prune.errors import ArgumentTypeError, ArgumentValueError


@pytest.mark.parametrize(
    ("given", "units", "limit"),
    [
        ("1.5x", COUNT_UNITS, 80.0),
        ("80%", COUNT_UNITS, 96.0),
        (0.5, BYTE_UNITS, 60.0),
        ("0.5", TIME_UNITS, 60.0),
        ("6GB", BYTE_UNITS, 6e9),
        ("1.5 GiB", BYTE_UNITS, 1.5 * 1024**3),
        (100e6, COUNT_UNITS, 1e8),
        (10**23, COUNT_UNITS, 1e23),
        (np.float64(0.5), COUNT_UNITS, 60.0),
        (np.float32(0.5), BYTE_UNITS, 60.0),
        (np.float16(0.5), TIME_UNITS, 60.0),
        (np.int64(10**9), BYTE_UNITS, 1e9),
        (np.float64(1e8), COUNT_UNITS, 1e8),
        (Fraction(1, 2), COUNT_UNITS, 60.0),
        ("7B", COUNT_UNITS, 7e9),
        ("120ms", TIME_UNITS, 0.12),
        ("2 s", TIME_UNITS, 2.0),
    ],
)
def test_amounts_are_fractions_of_dense_or_absolute(given, units, limit):
    assert parse_amount("budget.x", given, units).of(120.0) == pytest.approx(limit)


@pytest.mark.parametrize(
    ("given", "units"),
    [
        ("0.5x", COUNT_UNITS),
        ("1x", COUNT_UNITS),
        (1, COUNT_UNITS),
        ("100%", COUNT_UNITS),
        (0, COUNT_UNITS),
        (-3, COUNT_UNITS),
        ("fast", COUNT_UNITS),
        ("1.2.3", COUNT_UNITS),
        ("6GB", COUNT_UNITS),
        (float("nan"), COUNT_UNITS),
        (float("inf"), COUNT_UNITS),
        (10**400, COUNT_UNITS),
        (np.float64("nan"), COUNT_UNITS),
        (np.float64(1.0), COUNT_UNITS),
        (np.float64(120), TIME_UNITS),
        (120, TIME_UNITS),
        ("5 parsecs", TIME_UNITS),
    ],
)
def test_what_cannot_be_an_amount_is_refused_by_name(given, units):
    with pytest.raises(ArgumentValueError, match=r"budget\.x must be"):
        parse_amount("budget.x", given, units)


@pytest.mark.parametrize("given", [True, np.bool_(True), None, [0.5], np.array([0.5]), 0.5j])
def test_what_is_no_number_is_refused_by_its_type(given):
    with pytest.raises(ArgumentTypeError, match=r"budget\.x must be"):
        parse_amount("budget.x", given, COUNT_UNITS)


def test_a_budget_may_be_computed_with_numpy():
    share = np.linspace(0.6, 0.9, 4)[2]
    budget = Budget(params=share, memory=np.int64(10**9), batch=np.int64(2), length=np.int64(32))
    assert budget == Budget(params=0.8, memory=10**9, batch=2, length=32)
    assert type(budget.batch) is type(budget.length) is int
    assert Budget.of({"flops": share}) == PruningConfig(budget={"flops": share}).budget


def test_text_mappings_and_objects_say_the_same():
    text = Budget.of("latency=1.5x, latency.decode=1.2x, memory=6GB, length=4096")
    assert text == Budget(latency={"prefill": "1.5x", "decode": "1.2x"}, memory="6GB", length=4096)
    assert Budget.of({"flops": 0.5}) == Budget(flops=0.5)
    assert text.asked == {"memory": "6GB", "latency.prefill": "1.5x", "latency.decode": "1.2x"}
    assert Budget(latency="1.5x").phases == ("prefill",)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("speed=2x", "speed"),
        ("memory", "memory=6GB"),
        ("params=0.5,params=0.6", "twice"),
        ("latency=2x,latency.prefill=1.5x", "twice"),
        ("latency.sleep=2x", "phase"),
        ("flops.decode=2x", "like"),
        ("length=512", "must limit one of"),
        ("params=0.5,batch=0", "budget.batch"),
        ("params=0.5,length=many", "budget.length"),
        ({"memory": 0.5, "dtype": "int7"}, "budget.dtype"),
        (7, "text like"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(given, said):
    with pytest.raises((ArgumentValueError, ArgumentTypeError), match=said):
        PruningConfig(budget=given)


def test_a_ratio_beside_a_budget_is_refused():
    with pytest.raises(ArgumentValueError, match="pruning_ratio or budget"):
        PruningConfig(pruning_ratio=0.4, budget="params=0.5")


def test_steps_go_evenly_towards_the_budget():
    steps = PruningConfig(budget="params=0.5", iterations=4).steps(None, [])
    assert [step.budget_share for step in steps] == [0.25, 0.5, 0.75, 1.0]
    shares = [step.budget_share for step in PruningConfig(budget="params=0.5").steps(None, [])]
    assert shares == [0.5, 1.0]
