"""What was asked, predicted and measured of each limit of a budget, as rows of a table and as numbers for loggers."""

from __future__ import annotations

import sys
from typing import Any

from lit_prune.budgets.amounts import format_amount
from lit_prune.budgets.budget import UNITS, units_of
from lit_prune.plan import PruningPlan

_HEADING = ["budget", "asked", "limit", "predicted", "measured", "dense", "dense / now"]
_NUMBERS = ("dense", "target", "predicted")


def budgets_of(plan: PruningPlan | None) -> list[dict[str, Any]]:
    """The limits that a plan was made for, see :meth:`lit_prune.budgets.goals.Goals.rows`; none without a budget.

    A plan may be edited by hand, and nothing depends on what it says of its limits: what is no such row is passed over.
    """
    found = () if plan is None else plan.info.get("budgets", ())
    return [limit for limit in found if _is_limit(limit)] if isinstance(found, (list, tuple)) else []


def _is_limit(limit: Any) -> bool:
    if not isinstance(limit, dict) or not all(isinstance(limit.get(key), str) for key in ("name", "asked")):
        return False
    numbers = [limit.get(key) for key in _NUMBERS]
    if limit.get("measured") is not None:
        numbers.append(limit["measured"])
    return limit["name"].partition(".")[0] in UNITS and all(map(_is_amount, numbers))


def _is_amount(value: Any) -> bool:
    # an integer of any length is read from JSON
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


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
        for key in (*_NUMBERS, "measured")
        if limit.get(key) is not None
    }
