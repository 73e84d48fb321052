"""What was asked, predicted and measured of each limit of a budget, as rows of a table and as numbers for loggers."""

from __future__ import annotations

from typing import Any

from lit_prune.budgets.amounts import format_amount
from lit_prune.budgets.budget import units_of
from lit_prune.plan import PruningPlan

_HEADING = ["budget", "asked", "limit", "predicted", "measured", "dense", "dense / now"]


def budgets_of(plan: PruningPlan | None) -> list[dict[str, Any]]:
    """The limits that a plan was made for, see :meth:`lit_prune.budgets.goals.Goals.rows`; none without a budget."""
    return [] if plan is None else list(plan.info.get("budgets", ()))


def budget_rows(plan: PruningPlan | None) -> list[list[str]]:
    """A heading, and for every limit of the plan what was asked, predicted and measured; empty without a budget."""
    rows = []
    for limit in budgets_of(plan):
        units = units_of(limit["name"])
        numbers = [limit[key] for key in ("target", "predicted")]
        shown = [format_amount(number, units) for number in numbers]
        measured = limit.get("measured")
        now = limit["predicted"] if measured is None else measured
        shown += ["" if measured is None else format_amount(measured, units), format_amount(limit["dense"], units)]
        rows.append([limit["name"], limit["asked"], *shown, f"{limit['dense'] / now:.3f}"])
    return [_HEADING, *rows] if rows else []


def budget_numbers(plan: PruningPlan | None) -> dict[str, float]:
    """The numbers of the limits by keys for a logger: ``pruning/budget/NAME/target`` and so on."""
    return {
        f"pruning/budget/{limit['name']}/{key}": float(limit[key])
        for limit in budgets_of(plan)
        for key in ("dense", "target", "predicted", "measured")
        if key in limit
    }
