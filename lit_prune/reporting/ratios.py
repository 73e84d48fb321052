"""Plans for several ratios side by side: a table, a picture, and files."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence

import numpy as np
from rich.table import Table

from lit_prune._files import replacing_files, write_text
from lit_prune.extras import missing
from lit_prune.ratios import RatioPlan
from lit_prune.reporting.colours import KEPT, PALE, REMOVED

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise missing("matplotlib", "plots", "The picture of several ratios") from error


def ratio_rows(plans: Sequence[RatioPlan], dense: int) -> list[dict[str, float]]:
    """What is known of every plan, as numbers by name.

    Args:
        plans: The plans.
        dense: Number of parameters of the dense model.
    """
    return [
        {
            "ratio": p.ratio,
            "parameters": p.parameters,
            "removed": 1 - p.parameters / dense,
            "importance_removed": p.importance_removed,
            **({} if p.loss is None else {"masked_loss": p.loss}),
        }
        for p in plans
    ]


def ratio_table(plans: Sequence[RatioPlan], dense: int) -> Table:
    """The plans as a rich table, one row for each."""
    rows = ratio_rows(plans, dense)
    table = Table(title="Plans from one calibration")
    headings = {
        "ratio": "ratio",
        "parameters": "parameters",
        "removed": "removed",
        "importance_removed": "importance removed",
        "masked_loss": "held-out loss, masked",
    }
    formats = {"ratio": "{:g}", "parameters": "{:,.0f}", "removed": "{:.1%}", "importance_removed": "{:.2%}"}
    for name in rows[0]:
        table.add_column(headings[name], justify="right")
    for row in rows:
        table.add_row(*(formats.get(name, "{:.4g}").format(value) for name, value in row.items()))
    return table


def ratio_figure(plans: Sequence[RatioPlan], dense: int) -> Figure:
    """What is predicted to be lost over the size: the importance removed, and the loss of the masked model if it was measured.

    The curve of importance is that of removing groups by score alone, without limits; the points are the plans.

    Args:
        plans: The plans.
        dense: Number of parameters of the dense model.
    """
    measured = all(p.loss is not None for p in plans)
    figure = Figure(figsize=(9, 3.4 * (1 + measured)), layout="constrained")
    axes = figure.subplots(1 + measured, 1, squeeze=False, sharex=True)[:, 0]
    table = plans[-1].table
    order = np.argsort(table.score, kind="stable")
    importance = np.clip(table.importance[order], 0, None).cumsum()
    sizes = dense - table.cost[order].cumsum()
    shown = sizes >= plans[-1].parameters - 0.05 * dense
    axes[0].plot(sizes[shown], importance[shown] / max(importance[-1], 1e-300), color=PALE, linewidth=3, zorder=1)
    parameters = [p.parameters for p in plans]
    axes[0].scatter(parameters, [p.importance_removed for p in plans], color=KEPT, zorder=2)
    axes[0].set_ylabel("share of importance removed")
    if measured:
        axes[1].plot(parameters, [p.loss for p in plans], color=REMOVED, marker="o")
        axes[1].set_ylabel("held-out loss of the masked model")
    for plan in plans:
        axes[-1].annotate(
            f"{plan.ratio:g}",
            (plan.parameters, plan.importance_removed if not measured or plan.loss is None else plan.loss),
            (6, 6),
            textcoords="offset points",
            fontsize=9,
        )
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].invert_xaxis()
    axes[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes[-1].set_xlabel("parameters after the cut")
    return figure


def write_ratios(folder: str | os.PathLike[str], plans: Sequence[RatioPlan], dense: int) -> None:
    """Write ``plan-RATIO.json`` for every plan, ``ratios.json`` and ``ratios.png``: all or none.

    Args:
        folder: Where to write.
        plans: The plans.
        dense: Number of parameters of the dense model.
    """
    buffer = io.BytesIO()
    ratio_figure(plans, dense).savefig(buffer, format="png", dpi=130)
    with replacing_files(folder) as temporary:
        for plan in plans:
            plan.plan.save(temporary / f"plan-{plan.ratio:g}.json")
        write_text(temporary / "ratios.json", json.dumps(ratio_rows(plans, dense), indent=1) + "\n")
        (temporary / "ratios.png").write_bytes(buffer.getvalue())
