"""Seconds from the statistics to a plan, of writing and reading it, and of cutting the model."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    LARGE,
    Peak,
    build,
    markdown,
    synchronize,
)

from lit_prune import PruningConfig, apply_plan, find_group_sets, make_plan
from lit_prune.calibration.statistics import Statistics
from lit_prune.groups import GroupSet, count_bytes, count_parameters
from lit_prune.plan import PruningPlan
from lit_prune.ranking.registry import get_criterion


def random_statistics(group_sets: Sequence[GroupSet]) -> Statistics:
    """As calibration for ``second_order`` leaves them, with random numbers."""
    generator = torch.Generator().manual_seed(0)
    term = get_criterion("second_order").terms[0]
    numbers = {
        (term, s.key, position): torch.rand(s.size, generator=generator)
        for s in group_sets
        for position in range(len(s.slices))
    }
    return Statistics(batches=1, reduced=numbers)


def planning(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds from the statistics to a plan, of writing and reading it, and of cutting the model."""
    model = build(size, options)
    weights = count_bytes(model)
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = function()
        synchronize(options)
        seconds[name] = time.perf_counter() - start
        return result

    group_sets = timed("find", lambda: find_group_sets(model))
    numbers = random_statistics(group_sets)
    config = PruningConfig(importance="second_order", pruning_ratio=0.2)
    timed("check", lambda: config.check(model, group_sets))
    table, plan = timed("plan", lambda: make_plan(model, group_sets, numbers, config))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.json")
        timed("write", lambda: plan.save(path))
        read = timed("read", lambda: PruningPlan.load(path))
    assert read == plan
    result: dict[str, Any] = {"groups": len(table), "parameters": count_parameters(model), "seconds": seconds}
    if size not in LARGE:
        peak = Peak(options)
        before = peak.start()
        timed("cut", lambda: apply_plan(model, plan))
        result["cut_peak_over_weights"] = (peak.bytes() - before + weights) / weights
        result["parameters_after"] = count_parameters(model)
    return result


def report_planning(rows: Mapping[str, Any]) -> str:
    text = (
        "## Planning and cutting\n\nSeconds; 8B and 70B have their shapes only (`meta`), and are planned, not cut.\n\n"
    )
    steps = ("find", "check", "plan", "write", "read", "cut")
    table = [
        (
            size,
            f"{row['groups']:,}",
            *(f"{row['seconds'][step]:.2f}" if step in row["seconds"] else "" for step in steps),
            f"{1e6 * row['seconds']['plan'] / row['groups']:.2f}",
            f"{row['cut_peak_over_weights']:.2f}" if "cut_peak_over_weights" in row else "",
        )
        for size, row in rows.items()
    ]
    return text + markdown(("model", "groups", *steps, "plan, µs a group", "peak of the cut, of the weights"), table)
