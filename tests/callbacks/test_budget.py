"""Budgets inside a fit: checked at its start, met by the cut, reported and carried by the checkpoint."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from test_pruning import fit, pruning
from torch.utils.flop_counter import FlopCounterMode

from conftest import tiny
from lit_prune import Budget, BudgetError, find_group_sets
from lit_prune.budgets.latency_table import LatencyTable, Times, save_tables, setting_of
from lit_prune.budgets.workloads import Workload
from lit_prune.callbacks import CubicSchedule, PruningReport
from lit_prune.errors import ArgumentValueError


def test_a_fit_meets_its_budget_and_reports_it(tmp_path, capsys):
    out = tmp_path / "out"
    budget = "flops=1.3x,memory=0.8,length=32,batch=2"
    callback = pruning(pruning_ratio=0.2, budget=budget, epoch=1)
    _, module = fit(tmp_path, callback, PruningReport(out, save_model=False), logger=CSVLogger(tmp_path))
    model = module.inner["lm"]
    limits = {row["name"]: row for row in json.loads((out / "budgets.json").read_text())}
    assert set(limits) == {"flops", "memory"}
    for row in limits.values():
        assert row["measured"] == row["predicted"] <= row["target"] < row["dense"]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(input_ids=torch.zeros(2, 32, dtype=torch.long), use_cache=False)
    assert limits["flops"]["measured"] == counter.get_total_flops()
    assert callback.plan.info["budgets"] == list(limits.values())
    printed, page = capsys.readouterr().out, (out / "report.html").read_text()
    for word in ("flops", "1.3x", "predicted", "measured"):
        assert word in printed and word in page
    assert 'id="budgets"' in page and 'alt="trade_off"' in page
    points = json.loads((out / "trade_offs.json").read_text())
    assert points["flops"][0]["importance"] == 0 < points["flops"][-1]["importance"]
    with open(next(tmp_path.rglob("metrics.csv")), encoding="utf-8") as file:
        logged = {k: v for row in csv.DictReader(file) for k, v in row.items() if v}
    assert float(logged["pruning/budget/flops/measured"]) == limits["flops"]["measured"]
    assert float(logged["pruning/budget/memory/target"]) == pytest.approx(limits["memory"]["target"])


def test_a_budget_that_cannot_be_met_ends_the_fit_at_its_start(tmp_path):
    callback = pruning(budget=Budget(memory=0.01, length=32), epoch=1)
    with pytest.raises(BudgetError, match=r"memory is .* the floors allow .*binds is memory"):
        fit(tmp_path, callback)
    assert callback.table is None


def test_times_of_another_machine_decide_in_a_dry_run(tmp_path):
    model = tiny()
    group_sets = find_group_sets(model)
    times = tuple(
        Times(kind, size, tuple(s.name for s in group_sets if s.kind == kind), (0, size), (each, 0.0))
        for kind, size, each in {(s.kind, s.size, 0.25 if s.kind == "attention" else 0.01) for s in group_sets}
    )
    save_tables(
        tmp_path / "times.json", [LatencyTable(setting_of(Workload(model, 1, 32), group_sets, "prefill"), 1.0, times)]
    )
    budget = Budget(latency=0.7, latency_table=tmp_path / "times.json", length=32)
    callback = pruning(budget=budget, dry_run=True, importance="magnitude")
    fit(tmp_path, callback)
    # all the time there is to save is in the attention
    assert callback.plan.info["binding"] == ["latency.prefill"]
    assert {e.kind for e in callback.plan.entries} == {"attention"}
    (row,) = callback.plan.info["budgets"]
    assert row["predicted"] <= 0.7 and "measured" not in row


def test_a_budget_beside_a_schedule_is_refused():
    with pytest.raises(ArgumentValueError, match="one epoch or step"):
        pruning(budget="params=0.5", schedule=CubicSchedule(0, 4, 2))
