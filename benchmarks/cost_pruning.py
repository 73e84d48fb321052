"""Seconds and peak memory of all of ``prune``, beside a bare forward and backward pass over the same batches."""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Mapping
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
from torch import nn

from lit_prune import PruningConfig, find_group_sets, prune
from lit_prune.groups import count_bytes, count_parameters

WHOLE: dict[str, dict[str, Any]] = {
    "default": {},
    "two iterations": {"iterations": 2},
    "no compensation": {"compensation": False},
    "no repair": {"repair": None},
    "taylor, no repair": {"importance": "taylor", "repair": None},
    'quality="fast"': {"quality": "fast"},
    'quality="best"': {"quality": "best"},
}


WHOLE_BATCHES = 8


def pruning(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of all of ``prune``, beside a bare forward and backward pass over the same batches."""
    model, passes, pruned = _cases(case, options)
    before = interleaved({BARE: functools.partial(passes, drop=True)}, options, 2)[BARE]
    start = time.perf_counter()
    pruned()
    return {
        "tokens": WHOLE_BATCHES * options.tokens,
        "seconds": time.perf_counter() - start,
        "bare_seconds": before,
        "parameters_after": count_parameters(model),
    }


def pruning_memory(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of all of ``prune``, weights included, beside those of bare forward and backward passes."""
    model, passes, pruned = _cases(case, options)
    weights = count_bytes(model)
    found = {}
    runs = {"dropped_peak": functools.partial(passes, drop=True), "bare_peak": passes, "peak": pruned}
    for name, run in runs.items():
        peak = Peak(options)
        before = peak.start()
        run()
        found[name] = peak.bytes() - before + weights
    return {"weights": weights, **found}


def _cases(case: str, options: argparse.Namespace) -> tuple[nn.Module, Callable[..., object], Callable[[], None]]:
    """The model, the bare passes over the calibration batches, and the whole pruning."""
    model = build("100M", options)
    data = make_batches(options, WHOLE_BATCHES, options.tokens)

    def pruned() -> None:
        prune(model, data, loss_of(model), PruningConfig(**WHOLE[case], pruning_ratio=0.2))
        synchronize(options)

    return model, functools.partial(bare, model, find_group_sets(model), data), pruned


def report_pruning(rows: Mapping[str, Any]) -> str:
    tokens = next(iter(rows.values()))["tokens"]
    text = (
        f"## All of a pruning\n\n100M, 20% of all parameters, {tokens:,} calibration tokens: calibration, ranking, repair and"
        " surgery. Bare: a forward and backward pass over the same batches with gradients of the groups' weights. Solving for"
        " the repair takes the same time however many tokens there are. The weights are random, so that it is no measure of"
        " quality.\n\n"
    )
    table = []
    for case, row in rows.items():
        ratio = row["seconds"] / statistics.median(row["bare_seconds"])
        table.append((case, f"{row['seconds']:.1f}", f"{ratio:.2f}", f"{row['parameters_after']:,}"))
    return text + markdown(("", "seconds", "of the bare pass", "parameters after"), table)


def report_pruning_memory(rows: Mapping[str, Any]) -> str:
    text = (
        "## Peak memory of a pruning\n\nThe same. The bare passes leave the gradients of the groups' weights, or free each the"
        " moment it is there; what calibration records for the repair may take as much as those gradients. What is freed goes"
        " back to the system at once.\n\n"
    )
    bases = ("bare_peak", "dropped_peak")
    table = [
        (case, f"{row['peak'] / 1e6:.0f}", *(f"{row['peak'] / row[base]:.2f}" for base in bases))
        for case, row in rows.items()
    ]
    return text + markdown(("", "peak, MB", "of the bare pass", "of it, gradients freed"), table)
