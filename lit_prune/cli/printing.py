"""What commands print."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from lit_prune.reporting.page import cost_table, report_table
from lit_prune.text_escape import for_console


def print_report(metrics: Mapping[str, Mapping[str, float]], folder: Path, costs: Mapping[str, float]) -> None:
    """Print tables of metrics and costs, and where they were written."""
    if metrics:
        Console().print(report_table(metrics))
    if costs:
        Console().print(cost_table(costs))
    say(f"Written to {folder}")


def say(text: str) -> None:
    """Print a line."""
    Console().print(for_console(text), soft_wrap=True)
