"""Seconds and peak memory of every phase, measured without resetting a counter that others read."""

from __future__ import annotations

import contextlib
import resource
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from conftest import SMALL, tiny
from lit_prune import PruningConfig
from lit_prune.costs import Costs, cost_rows
from lit_prune.detection import find_or_trace
from lit_prune.group_data import keep_group_sets
from lit_prune.pipeline import prune_with

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("repair", ["least_squares", "bias", None])
def test_the_phases_of_a_pruning_make_up_its_time(repair):
    model = tiny()
    batches = [torch.randint(0, SMALL["vocab_size"], (2, 16), generator=torch.Generator().manual_seed(0))] * 2
    costs, purposes = Costs(), []

    def data(purpose):
        purposes.append(purpose)
        return contextlib.nullcontext((batches, lambda b: model(input_ids=b, labels=b).loss))

    config = PruningConfig(importance="fisher", pruning_ratio=0.2, repair=repair)
    start = time.perf_counter()
    prune_with(model, data, config, costs=costs)
    took = time.perf_counter() - start
    # least squares and what it can make up for take what calibration recorded, and run no batches
    least_squares = {"repair", "compensation"} if repair == "least_squares" else set()
    assert set(costs.phases) == {*purposes, "planning", "surgery"} | least_squares | ({"repair"} if repair else set())
    numbers = costs.numbers()
    assert 0.5 * took < numbers["total_seconds"] <= took
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 0 < numbers["calibration_peak_bytes"] <= numbers["total_peak_bytes"] <= peak
    assert [row[0] for row in cost_rows(numbers)[1:]] == [*costs.phases, "total"]


def test_recalibration_is_a_phase_of_models_with_batch_norms():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(128, 4),
    )
    batches = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))]

    def loss(batch):
        return functional.cross_entropy(model(batch), torch.arange(4))

    keep_group_sets(model, find_or_trace(model, batches, loss))
    costs = Costs()
    config = PruningConfig(importance="magnitude", pruning_ratio=0.3)
    prune_with(model, lambda _: contextlib.nullcontext((batches, loss)), config, costs=costs)
    assert list(costs.phases)[-3:] == ["repair", "surgery", "recalibration"]
    assert costs.phases["recalibration"].seconds > 0


def test_a_phase_counts_when_it_fails():
    costs = Costs()
    for _ in range(2):
        with pytest.raises(KeyError), costs.phase("repair", torch.device("cpu")):
            time.sleep(0.02)
            raise KeyError
    assert costs.phases["repair"].seconds >= 0.04 and costs.phases["repair"].peak_bytes > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_peak_counter_of_a_device_is_left_alone():
    big = torch.empty(1 << 26, device="cuda")
    del big
    before = torch.cuda.max_memory_allocated()
    costs = Costs()
    with costs.phase("repair", torch.device("cuda")):
        torch.ones(8, device="cuda")
    assert torch.cuda.max_memory_allocated() == before == costs.phases["repair"].peak_bytes


def test_nothing_resets_a_peak_counter():
    files = [*(ROOT / "lit_prune").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]
    # that of ``lit-prune compare``, a process of its own
    files.remove(ROOT / "lit_prune" / "reporting" / "latency.py")
    for name in ("reset_peak", "reset_max_memory", "reset_accumulated"):
        assert not [path for path in files if name in path.read_text(encoding="utf-8")]
