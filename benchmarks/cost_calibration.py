"""Seconds of gathering the statistics of each criterion, beside bare passes over the same batches."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from common import (
    BARE,
    BARE_ALL,
    BARE_FORWARD,
    SEED,
    bare,
    bare_all,
    bare_forward,
    build,
    gather,
    interleaved,
    loss_of,
    make_batches,
    markdown,
    ratio,
    spread,
    verdict,
)
from torch import Tensor, nn

from lit_prune import find_group_sets
from lit_prune.groups import GroupSet

BACKWARD = ("taylor", "taylor_2nd", "taylor_batch", "second_order", "fisher")


FORWARD = ("wanda", "output_wanda")


def seed_way(model: nn.Module, group_sets: Sequence[GroupSet], data: Sequence[Tensor]) -> None:
    """The elementwise way: g and the mean of squares of every weight as whole float32 tensors in CPU memory."""
    scored = {part.parameter for s in group_sets for part in s.slices}
    g = {n: torch.zeros(p.shape) for n, p in model.named_parameters() if n in scored}
    h = {n: torch.zeros(p.shape) for n, p in model.named_parameters() if n in scored}
    for ids in data:
        model.zero_grad()
        loss_of(model)(ids).backward()
        for name, parameter in model.named_parameters():
            if name in scored:
                gradient = parameter.grad.detach().float()  # type: ignore[union-attr]
                g[name] += gradient.cpu() / len(data)
                h[name] += (gradient**2).cpu() / len(data)
    model.zero_grad()


def calibration(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of gathering the statistics of each criterion, beside the bare passes over the same batches."""
    model = build(size, options)
    group_sets = find_group_sets(model)
    data = make_batches(options, options.batches, options.tokens)
    cases: dict[str, Callable[[], object]] = {
        BARE: lambda: bare(model, group_sets, data),
        BARE_ALL: lambda: bare_all(model, data),
        BARE_FORWARD: lambda: bare_forward(model, data),
        SEED: lambda: seed_way(model, group_sets, data),
    }
    for name in (*BACKWARD, *FORWARD):
        cases[name] = lambda name=name: gather(model, group_sets, data, name)
    seconds = interleaved(cases, options)
    return {
        "batches": options.batches,
        "tokens": options.tokens,
        "cases": {
            name: {
                "seconds": statistics.median(values),
                **ratio(values, seconds[BARE_FORWARD if name in (*FORWARD, BARE_FORWARD) else BARE]),
            }
            for name, values in seconds.items()
        },
        "seed_over_streaming": ratio(seconds[SEED], seconds["taylor_2nd"]),
    }


def report_calibration(rows: Mapping[str, Any]) -> str:
    targets = {"taylor": 1.05, "taylor_2nd": 1.05, "wanda": 1.10}
    text = "## Time of calibration\n\n"
    for size, row in rows.items():
        text += (
            f"{size}, {row['batches']} batches of {row['tokens']} tokens. Of the forward and backward pass for criteria"
            f" with gradients (those of the groups' weights), of the forward pass for the others.\n\n"
        )
        table = [
            (name, f"{case['seconds']:.2f}", spread(case), verdict(case["ratio"], targets.get(name)))
            for name, case in row["cases"].items()
        ]
        text += markdown(("case", "seconds", "of the bare pass", "target"), table)
        text += (
            f"\nThe seed's way takes {spread(row['seed_over_streaming'])} times what streaming `taylor_2nd` takes.\n"
        )
    return text
