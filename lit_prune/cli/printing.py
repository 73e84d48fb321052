"""What commands print."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from lit_prune.plan import PruningPlan
from lit_prune.reporting.page import report_tables
from lit_prune.text_escape import for_console


def print_report(
    metrics: Mapping[str, Mapping[str, float]], plan: PruningPlan, folder: Path, costs: Mapping[str, float]
) -> None:
    """Print tables of metrics, of the budget if there is one, and of costs, and where they were written."""
    for table in report_tables(metrics, plan, costs):
        Console().print(table)
    say(f"Written to {folder}")


def say(text: str) -> None:
    """Print a line."""
    Console().print(for_console(text), soft_wrap=True)
