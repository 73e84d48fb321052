"""Peak memory of gathering the statistics of each criterion."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common import (
    BARE,
    BARE_FORWARD,
    DROPPED,
    SEED,
    Peak,
    bare,
    bare_forward,
    build,
    gather,
    make_batches,
    markdown,
    verdict,
)
from cost_calibration import BACKWARD, FORWARD, seed_way
from torch import Tensor, nn

from lit_prune import find_group_sets
from lit_prune.groups import GroupSet, count_bytes

SIZES = ("100M", "700M")


OFFLOADED = "taylor, gradients offloaded"


MEMORY_CASES: dict[str, Callable[[nn.Module, Sequence[GroupSet], Sequence[Tensor]], None]] = {
    DROPPED: lambda model, sets, data: bare(model, sets, data, drop=True),
    BARE: bare,
    **{name: lambda model, sets, data, name=name: gather(model, sets, data, name) for name in BACKWARD},  # type: ignore[misc]
    "taylor, bfloat16": lambda model, sets, data: gather(model, sets, data, "taylor", gradient_dtype="bfloat16"),
    OFFLOADED: lambda model, sets, data: gather(model, sets, data, "taylor", offload_gradients=True),
    SEED: seed_way,
    BARE_FORWARD: lambda model, sets, data: bare_forward(model, data),
    **{name: lambda model, sets, data, name=name: gather(model, sets, data, name) for name in FORWARD},  # type: ignore[misc]
}


def memory(key: str, options: argparse.Namespace) -> dict[str, Any]:
    """Peak bytes of one case, over those of the model."""
    size, _, case = key.partition(": ")
    model = build(size, options)
    group_sets = find_group_sets(model)
    data = make_batches(options, 2, 256 if size == "100M" else 128)
    # what the first pass leaves behind for good (kernels, buffers of the allocator) is not the case's
    bare_forward(model, data[:1])
    peak = Peak(options)
    before = peak.start()
    MEMORY_CASES[case](model, group_sets, data)
    weights = count_bytes(model)
    return {"weights": weights, "peak": peak.bytes() - before + weights}


def report_memory(rows: Mapping[str, Any]) -> str:
    text = (
        "## Peak memory of calibration\n\nPeak of the process over what it held before, plus the weights; 2 batches, of 256"
        " tokens (100M) and 128 tokens (700M). `"
        + DROPPED
        + "` is weights and activations, with each gradient freed the"
        " moment it is there. `taylor` and `taylor_2nd` are the absolute value of a mean over batches, weight by weight, so by"
        " their definition they keep the mean gradient of every weight of the groups: these cannot stream. `bfloat16` halves"
        " that, and `offload_gradients` moves it off a GPU.\n\n"
    )
    table = []
    for key, row in rows.items():
        size, _, case = key.partition(": ")
        base = rows.get(f"{size}: {BARE_FORWARD if case in (*FORWARD, BARE_FORWARD) else DROPPED}")
        over = row["peak"] / base["peak"] if base else float("nan")
        target = None if case in (DROPPED, BARE, BARE_FORWARD, SEED) else 1.05
        table.append(
            (key, f"{row['weights'] / 1e6:.0f}", f"{row['peak'] / 1e6:.0f}", f"{over:.3f}", verdict(over, target))
        )
    return text + markdown(("case", "weights, MB", "peak, MB", "of weights and activations", "target"), table)
