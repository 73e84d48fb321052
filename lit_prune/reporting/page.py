"""Reports of a pruning run: a console table, files, and one HTML page."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from lit_prune._files import replacing_files, write_text
from lit_prune.costs import cost_rows
from lit_prune.plan import PruningPlan
from lit_prune.ranking.table import GroupTable
from lit_prune.reporting.budgets import budget_rows, budgets_of
from lit_prune.reporting.colours import PALE
from lit_prune.reporting.metrics import metric_rows
from lit_prune.text_escape import for_console, for_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def report_table(metrics: Mapping[str, Mapping[str, float]]) -> Table:
    """The metrics by stage as a rich table, one row for each metric."""
    return _console_table("Structured pruning", metric_rows(metrics))


def cost_table(costs: Mapping[str, float]) -> Table:
    """What each phase of pruning took (see :meth:`lit_prune.costs.Costs.numbers`) as a rich table, one row for each phase."""
    return _console_table("What pruning took", cost_rows(costs))


def budget_table(rows: Sequence[Sequence[str]]) -> Table:
    """What was asked, predicted and measured of a budget (see :func:`lit_prune.reporting.budgets.budget_rows`)."""
    return _console_table("Budget", rows)


def report_tables(
    metrics: Mapping[str, Mapping[str, float]], plan: PruningPlan | None, costs: Mapping[str, float]
) -> list[Table]:
    """The tables of a report for the console: metrics, the budget if there is one, and what pruning took."""
    limits = budget_rows(plan)
    found = [report_table(metrics)] if metrics else []
    return found + ([budget_table(limits)] if limits else []) + ([cost_table(costs)] if costs else [])


def _console_table(title: str, rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for position, heading in enumerate(rows[0]):
        table.add_column(for_console(heading), justify="right" if position else "left")
    for row in rows[1:]:
        table.add_row(*map(for_console, row))
    return table


_TITLES = {
    "kept": "What each layer kept",
    "importance": "Importance",
    "scores": "Where the cut came",
    "timeline": "Across the cut",
    "trade_off": "What other budgets would cost",
}


def html_report(
    metrics: Mapping[str, Mapping[str, float]],
    plan: PruningPlan,
    images: Mapping[str, bytes],
    title: str = "Pruning report",
    note: str = "",
    costs: Mapping[str, float] | None = None,
) -> str:
    """One self-contained HTML page with the metrics, the plots and how the plan came about.

    Args:
        metrics: Metrics by stage and name.
        plan: The plan.
        images: The pictures by name (see :func:`pictures`), as PNG.
        title: Heading of the page.
        note: A sentence below the metrics.
        costs: What each phase took, see :meth:`lit_prune.costs.Costs.numbers`; no table if there are none.
    """
    info = "".join(
        f"<tr><td>{for_html(k)}</td><td>{for_html(v if isinstance(v, str) else json.dumps(v))}</td></tr>"
        for k, v in plan.info.items()
    )
    limits = budget_rows(plan)
    sections = "".join(
        f"<section><h2>{for_html(_TITLES.get(name, name))}</h2>"
        f'<img alt="{for_html(name)}" src="data:image/png;base64,{base64.b64encode(image).decode()}"></section>'
        for name, image in images.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{for_html(title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; }} th, td {{ padding: .25rem .9rem; border-bottom: 1px solid {PALE}; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }} .info td {{ text-align: left; }}
img {{ width: 100%; height: auto; }}
</style>
</head>
<body>
<h1>{for_html(title)}</h1>
{_html_table("metrics", metric_rows(metrics))}
<p>{for_html(note)}</p>
{f"<h2>Budget</h2>{_html_table('budgets', limits)}" if limits else ""}
{sections}
{f"<h2>What pruning took</h2>{_html_table('costs', cost_rows(costs))}" if costs else ""}
<h2>How the plan came about</h2>
<table class="info" id="plan">{info}<tr><td>digest</td><td>{plan.digest()}</td></tr></table>
</body>
</html>
"""


def _html_table(name: str, rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{for_html(c)}</th>" for c in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{for_html(c)}</td>" for c in row) + "</tr>" for row in rows[1:])
    return f'<table id="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def write_report(
    folder: str | os.PathLike[str],
    metrics: Mapping[str, Mapping[str, float]],
    plan: PruningPlan,
    table: GroupTable | None = None,
    timeline: Sequence[Mapping[str, Any]] = (),
    note: str = "",
    costs: Mapping[str, float] | None = None,
) -> dict[str, Figure]:
    """Write ``report.json``, ``plan.json``, ``group_table.csv``, the pictures as PNG, and ``report.html``: all or none.

    With costs ``costs.json``, with a budget ``budgets.json``, and with what other budgets would cost ``trade_offs.json``, too.

    Args:
        folder: Where to write.
        metrics: Metrics by stage and name.
        plan: The plan.
        table: The group table, if it is at hand.
        timeline: As for :func:`timeline_figure`.
        note: A sentence for the page, below the metrics.
        costs: What each phase took, see :meth:`lit_prune.costs.Costs.numbers`.

    Returns:
        The pictures by name.

    Raises:
        MissingPackageError: If matplotlib is not installed.
    """
    from lit_prune.reporting.plots import pictures

    drawn = pictures(plan, table, timeline)
    images = {name: _png(figure) for name, figure in drawn.items()}
    with replacing_files(folder) as temporary:
        plan.save(temporary / "plan.json")
        if table is not None:
            table.to_csv(temporary / "group_table.csv")
        for name, image in images.items():
            (temporary / f"{name}.png").write_bytes(image)
        write_text(temporary / "report.html", html_report(metrics, plan, images, note=note, costs=costs))
        if limits := budgets_of(plan):
            write_text(temporary / "budgets.json", json.dumps(limits, indent=1) + "\n")
        if table is not None and table.trade_offs:
            write_text(temporary / "trade_offs.json", json.dumps(table.trade_offs, indent=1) + "\n")
        if costs:
            write_text(temporary / "costs.json", json.dumps(dict(costs), indent=1) + "\n")
        write_text(temporary / "report.json", json.dumps(dict(metrics), indent=1) + "\n")
    return drawn


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
