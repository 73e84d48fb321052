"""Seconds and peak memory of all of ``prune``, beside a bare forward and backward pass over the same batches."""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Mapping
from typing import Any

from common import (
    BARE,
    Peak,
    bare,
    build,
    interleaved,
    loss_of,
    make_batches,
    markdown,
    synchronize,
)

from lit_prune import PruningConfig, find_group_sets, prune
from lit_prune.groups import count_bytes, count_parameters

WHOLE: dict[str, dict[str, Any]] = {
    "default": {},
    "one iteration": {"iterations": 1},
    "one iteration, no compensation": {"iterations": 1, "compensation": False},
    "one iteration, no repair": {"iterations": 1, "repair": None},
    "taylor, one iteration, no repair": {"importance": "taylor", "iterations": 1, "repair": None},
}


WHOLE_BATCHES = 8


def pruning(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of all of ``prune``, beside a bare forward and backward pass over the same batches."""
    model = build("100M", options)
    group_sets = find_group_sets(model)
    data = make_batches(options, WHOLE_BATCHES, options.tokens)
    dropped = functools.partial(bare, model, group_sets, data, drop=True)
    peak = Peak(options)
    before = peak.start()
    base = interleaved({BARE: dropped}, options, 2)[BARE]
    weights = count_bytes(model)
    base_peak = peak.bytes() - before + weights
    before = peak.start()
    start = time.perf_counter()
    prune(model, data, loss_of(model), PruningConfig(**WHOLE[case], pruning_ratio=0.2))
    synchronize(options)
    seconds = time.perf_counter() - start
    return {
        "tokens": WHOLE_BATCHES * options.tokens,
        "seconds": seconds,
        "bare_seconds": base,
        "peak": peak.bytes() - before + weights,
        "bare_peak": base_peak,
        "weights": weights,
        "parameters_after": count_parameters(model),
    }


def report_pruning(rows: Mapping[str, Any]) -> str:
    tokens = next(iter(rows.values()))["tokens"]
    text = (
        f"## All of a pruning\n\n100M, 20% of all parameters, {tokens:,} calibration tokens: calibration, ranking, repair and"
        " surgery. Bare: a forward and backward pass over the same batches with gradients of the groups' weights, and its"
        " peak memory, each gradient freed the moment it is there. Solving for the repair takes the same time however"
        " many tokens there are.\n\n"
    )
    table = []
    for case, row in rows.items():
        bare = statistics.median(row["bare_seconds"])
        table.append(
            (
                case,
                f"{row['seconds']:.1f}",
                f"{row['seconds'] / bare:.2f}",
                f"{row['peak'] / 1e6:.0f}",
                f"{row['peak'] / row['bare_peak']:.2f}",
            )
        )
    return text + markdown(("", "seconds", "of the bare pass", "peak, MB", "of the bare pass's peak"), table)
