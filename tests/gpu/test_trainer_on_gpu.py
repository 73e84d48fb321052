"""Rows of the trainer matrix on one GPU: equal to a dense run whose removed groups are set to zero."""

from __future__ import annotations

import pytest
import torch
from gpu_device import DEVICE, needs_gpu
from test_matrix import CASES, LOOSE, Base, Mask
from test_pruning import fit, pruning

from conftest import tiny
from lit_prune import apply_plan

ROWS = (
    *("SGD", "AdamW", "param groups", "two optimizers by hand", "scheduler by step", "accumulate", "clip norm"),
    *("bf16-mixed", "bf16-true", "gradient checkpointing", "torch.compile", "iterable dataset", "dict batches"),
    *("no validation", "at step 0"),
)

pytestmark = needs_gpu


@pytest.fixture
def device():
    return DEVICE


def options_for(device, **options):
    return {"accelerator": "cpu" if device.type == "cpu" else "gpu", "devices": 1, **options}


def moved_apart(model, dense, plan):
    """How far two trained models are apart, relative to how far training moved the second, by parameter."""
    start = tiny("llama")
    apply_plan(start, plan)
    first = {name: value.double() for name, value in start.state_dict().items()}
    expected = {name: value.double().cpu() for name, value in dense.state_dict().items()}
    for name, value in model.state_dict().items():
        moved = (expected[name] - first[name]).norm()
        assert moved > 0, name
        yield name, float((value.double().cpu() - expected[name]).norm() / (moved + 1e-6 * first[name].norm()))


@pytest.mark.parametrize("name", [*ROWS, "16-mixed"])
def test_a_pruned_run_equals_a_masked_dense_one(tmp_path, device, name):
    kind, options, when = CASES[name] if name in ROWS else (Base, {"precision": "16-mixed"}, {})
    if name == "16-mixed" and device.type == "cpu":
        pytest.skip("Lightning has no 16-mixed on a CPU")
    options = options_for(device, **options)
    callback = pruning(repair=None, **when)
    _, module = fit(tmp_path, callback, module=kind(), **options)
    _, dense = fit(tmp_path, Mask(callback.plan, **(when or {"epoch": 1})), module=kind(), **options)
    apply_plan(dense.inner["lm"], callback.plan)
    # sums in another order, which training amplifies
    tolerance = max(LOOSE.get(name, 0.0), 5e-3)
    for key, apart in moved_apart(module.inner["lm"], dense.inner["lm"], callback.plan):
        assert apart <= tolerance, key


@pytest.mark.parametrize("options", [{}, {"repair": "least_squares", "importance": "fisher", "iterations": 2}])
def test_two_runs_with_deterministic_algorithms_are_equal(tmp_path, device, monkeypatch, options):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    runs = []
    try:
        for _ in range(2):
            callback = pruning(**options)
            _, module = fit(tmp_path, callback, module=Base(), deterministic=True, **options_for(device))
            runs.append((callback.plan.digest(), module.state_dict()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert runs[0][0] == runs[1][0]
    for name, value in runs[0][1].items():
        assert torch.equal(value, runs[1][1][name]), name


def test_a_cut_in_training_equals_that_of_the_cpu(tmp_path, device):
    """The plan of a GPU is that of the CPU, but for ties that rounding decides."""
    plans = []
    for where in (torch.device("cpu"), device):
        callback = pruning(importance="fisher", repair="least_squares", step=0)
        fit(tmp_path, callback, module=Base(), max_epochs=1, **options_for(where))
        plans.append({e.key: set(e.kept) for e in callback.plan.entries})
    assert plans[0].keys() == plans[1].keys()
    same = sum(len(plans[0][key] & plans[1][key]) for key in plans[0])
    assert same >= 0.95 * sum(map(len, plans[0].values()))
