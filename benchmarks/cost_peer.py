"""Calibrating and pruning by first-order Taylor, by this library and by torch-pruning."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

from common import (
    Peak,
    bare_forward,
    build,
    loss_of,
    make_batches,
    markdown,
    synchronize,
)
from peers import cut_by_torch_pruning
from torch import Tensor, nn

from lit_prune import PruningConfig, apply_plan, calibrate, find_group_sets, make_plan
from lit_prune.groups import count_parameters


def peer(which: str, options: argparse.Namespace) -> dict[str, Any]:
    """Calibrate and prune the 100M model, by this library or by torch-pruning; 20% of what can be pruned."""
    eager = which == "torch-pruning"
    model = build("100M", options)
    if eager:
        model.set_attn_implementation("eager")  # type: ignore[operator]
        model.config.use_cache = False  # type: ignore[union-attr]
    data = make_batches(options, options.batches, options.tokens)
    bare_forward(model, data[:1])
    before = count_parameters(model)
    peak = Peak(options)
    base = peak.start()
    start = time.perf_counter()
    seconds = {}
    if eager:
        _torch_pruning(model, data, seconds)
    else:
        config = PruningConfig(importance="taylor", pruning_ratio=0.2, ratio_of="prunable", repair=None)
        group_sets = find_group_sets(model)
        collected = calibrate(model, group_sets, data, loss_of(model), config)
        synchronize(options)
        seconds["calibrate"] = time.perf_counter() - start
        _, plan = make_plan(model, group_sets, collected, config)
        apply_plan(model, plan)
    synchronize(options)
    seconds["total"] = time.perf_counter() - start
    seconds["prune"] = seconds["total"] - seconds["calibrate"]
    weights = before * next(model.parameters()).element_size()
    bare_forward(model, data[:1])
    return {
        "seconds": seconds,
        "peak_over_weights": (peak.bytes() - base + weights) / weights,
        "parameters_before": before,
        "parameters_after": count_parameters(model),
    }


def _torch_pruning(model: nn.Module, data: Sequence[Tensor], seconds: dict[str, float]) -> None:
    """First-order Taylor of torch-pruning: heads and MLP channels."""
    start = time.perf_counter()
    for ids in data:
        loss_of(model)(ids).backward()
    seconds["calibrate"] = time.perf_counter() - start
    cut_by_torch_pruning(model, data[0][:1, :16], "taylor", 0.2)


def report_peer(rows: Mapping[str, Any]) -> str:
    text = (
        "## Beside torch-pruning\n\n100M, first-order Taylor, 20% of what can be pruned, the same batches; torch-pruning 1.6.1"
        " accumulates the gradients of all weights, needs eager attention to trace the model, and is given queries and keys that"
        " are not rotated while it does (the groups of transformers' rotation do not come to an end).\n\n"
    )
    table = [
        (
            name,
            *(f"{row['seconds'][step]:.2f}" for step in ("calibrate", "prune", "total")),
            f"{row['peak_over_weights']:.2f}",
            f"{row['parameters_after']:,}",
        )
        for name, row in rows.items()
    ]
    return text + markdown(
        ("", "calibrate, s", "prune, s", "total, s", "peak, of the weights", "parameters after"), table
    )
