"""Seconds of a multiplication whose width is off the hardware's multiples."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from common import (
    SHAPES,
    interleaved,
    markdown,
    ratio,
    spread,
)
from torch import Tensor, nn


def widths(key: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds a multiplication of one MLP block whose width is off the hardware's multiples, over width 1536."""
    tokens = int(key.split()[0])
    hidden = SHAPES["100M"][0]
    dtype = getattr(torch, options.dtype)
    x = torch.randn(tokens, hidden, device=options.device, dtype=dtype)
    cases: dict[str, Callable[[], object]] = {}
    # the name says the largest power of two that divides the width
    chosen = {"512": 1536, "1": 1531, "2": 1530, "4": 1532, "8": 1528, "16": 1520, "32": 1504, "64": 1472, "128": 1408}
    rounds = max(1, 2048 // tokens)
    for name, width in chosen.items():
        up, down = (
            torch.randn(a, b, device=options.device, dtype=dtype) for a, b in ((width, hidden), (hidden, width))
        )

        def run(up: Tensor = up, down: Tensor = down) -> None:
            with torch.inference_mode():
                for _ in range(rounds):
                    nn.functional.linear(nn.functional.linear(x, up), down)

        cases[name] = run
    seconds = interleaved(cases, options, 8 * options.repeats)
    each = {name: [s / chosen[name] for s in values] for name, values in seconds.items()}
    return {name: {"width": chosen[name], **ratio(values, each["512"])} for name, values in each.items()}


def report_widths(rows: Mapping[str, Any]) -> str:
    text = (
        "## What an uneven width costs\n\nTime for each column of two multiplications (768 to the width and back), over that"
        " of width 1536, by the largest power of two that divides the width.\n\n"
    )
    cases = list(next(iter(rows.values())))
    cases = [c for c in cases if c != "row_seconds"]
    table = [
        (f"{case} ({next(iter(rows.values()))[case]['width']})", *(spread(row[case], 2) for row in rows.values()))
        for case in cases
    ]
    return text + markdown(("multiple of (width)", *rows), table)
