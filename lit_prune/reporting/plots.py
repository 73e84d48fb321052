"""Plots of a pruning run: groups kept, importance, scores, and metrics over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lit_prune.extras import missing
from lit_prune.groups import BLOCK, is_inside, stack_of
from lit_prune.plan import PruningPlan
from lit_prune.ranking.table import GroupTable
from lit_prune.reporting.colours import KEPT, PALE, REMOVED
from lit_prune.text_escape import for_plot

try:
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
except ImportError as error:
    raise missing("matplotlib", "plots", "The pictures of a report") from error


_UNITS = {"attention": "head groups", "mlp": "channels", BLOCK: "blocks"}


def kept_figure(plan: PruningPlan, table: GroupTable) -> Figure:
    """A picture of what each layer kept: a bar a layer for every kind of group, with the dense number behind it.

    Args:
        plan: The plan; of all stages, if there were several.
        table: The group table of the last stage, for the layers that the plan leaves whole.
    """
    sizes = {
        key: (int(layer), int(size)) for key, layer, size in zip(table.keys, table.layers, table.sizes, strict=True)
    }
    kept = {key: size for key, (_, size) in sizes.items()}
    for entry in plan.group_entries:
        sizes[entry.key] = (entry.layer, entry.size)
        kept[entry.key] = len(entry.kept)
    for block in plan.removed_blocks:
        kept |= {key: 0 for key in kept if is_inside(key[0], block)}
        if (block, BLOCK) not in kept:
            # it left at an earlier stage than that of the table
            sizes[block, BLOCK], kept[block, BLOCK] = (stack_of(block)[1], 1), 0
    kinds = list(dict.fromkeys(kind for _, kind in sizes))
    figure = Figure(figsize=(9, 2.6 * len(kinds)), layout="constrained")
    for axis, kind in zip(figure.subplots(len(kinds), 1, squeeze=False)[:, 0], kinds, strict=True):
        keys = [key for key in sizes if key[1] == kind]
        layers = [sizes[key][0] for key in keys]
        dense = [sizes[key][1] for key in keys]
        axis.bar(layers, dense, color=PALE, label="dense")
        axis.bar(layers, [kept[key] for key in keys], color=KEPT, label="kept")
        share = sum(kept[key] for key in keys) / sum(dense)
        unit = _UNITS.get(kind, "groups")
        axis.set_title(f"{for_plot(kind)}: {share:.1%} of the {unit} kept", loc="left", fontsize=10)
        axis.set_ylabel(unit)
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set_xticks(layers[:: 1 + len(layers) // 40])
        axis.tick_params(axis="x", labelsize=8)
        axis.margins(x=0.01)
        axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("layer")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    return figure


def importance_figure(table: GroupTable, columns: int = 64) -> Figure:
    """A heat map of the scores: a row a layer, its groups from the highest score to the lowest, and where they were cut.

    Args:
        table: The group table.
        columns: Cells of a row at most; wider layers are averaged into so many.
    """
    kinds = list(dict.fromkeys(kind for _, kind in table.keys))
    scores, kept = table.score, table.kept
    positive = scores[(scores > 0) & np.isfinite(scores)]
    low, high = np.quantile(positive, [0.01, 0.999]) if len(positive) else (1.0, 2.0)
    norm = LogNorm(float(low), float(max(high, low * 1.01)), clip=True)
    figure = Figure(figsize=(9, 3.2 * len(kinds)), layout="constrained")
    for axis, kind in zip(figure.subplots(len(kinds), 1, squeeze=False)[:, 0], kinds, strict=True):
        places = [i for i, key in enumerate(table.keys) if key[1] == kind]
        width = min(columns, max(int(table.sizes[i]) for i in places))
        rows, borders = [], []
        for i in places:
            part = slice(table.offsets[i], table.offsets[i + 1])
            ordered = np.sort(scores[part])[::-1]
            rows.append([cell.mean() if len(cell) else np.nan for cell in np.array_split(ordered, width)])
            borders.append(width * kept[part].mean() if len(ordered) else 0)
        image = axis.imshow(np.maximum(rows, low), norm=norm, cmap="viridis", aspect="auto", interpolation="nearest")
        rows_of_cut = np.arange(len(borders))
        axis.vlines(np.array(borders) - 0.5, rows_of_cut - 0.5, rows_of_cut + 0.5, color=REMOVED, linewidth=2)
        layers = table.layers[places]
        ticks = range(0, len(layers), 1 + len(layers) // 20)
        axis.set_yticks(list(ticks), [str(layers[t]) for t in ticks], fontsize=8)
        shares = np.linspace(0, 1, 5)
        axis.set_xticks(width * shares - 0.5, [f"{share:.0%}" for share in shares], fontsize=8)
        axis.set_ylabel("layer")
        unit = _UNITS.get(kind, "groups")
        axis.set_title(f"{for_plot(kind)}: {unit} right of the red line were removed", loc="left", fontsize=10)
        figure.colorbar(image, ax=axis, label="importance / parameter", pad=0.01)
    axis.set_xlabel("share of the layer's groups, from the highest score to the lowest")
    return figure


def score_figure(table: GroupTable) -> Figure:
    """How the scores are distributed, what was kept and what left, and the score at which the cut came.

    Args:
        table: The group table.
    """
    kinds = list(dict.fromkeys(kind for _, kind in table.keys))
    scores, kept = table.score, table.kept
    # what saves nothing of the budget has no score
    positive = (scores > 0) & np.isfinite(scores)
    shown = np.log10(np.where(positive, scores, scores[positive].min() if positive.any() else 1.0))
    low, high = float(shown.min()), max(float(shown.max()), float(shown.min()) + 1e-3)
    cut = float(shown[table.leaving].max()) if table.leaving.any() else None
    step = (high - low) / 60
    # an edge just above the cut, so that no bar holds scores of both sides
    start = low if cut is None else cut + 1e-6 * step - step * math.ceil((cut - low) / step + 1e-6)
    edges = start + step * np.arange(math.ceil((high - start) / step + 1e-6) + 1)
    figure = Figure(figsize=(9, 2.4 * len(kinds)), layout="constrained")
    for axis, kind in zip(figure.subplots(len(kinds), 1, squeeze=False, sharex=True)[:, 0], kinds, strict=True):
        mine = table.kind_of_row == kind
        parts, colours = [shown[mine & ~kept], shown[mine & kept]], [REMOVED, KEPT]
        axis.hist(parts, edges, stacked=True, color=colours, label=["removed", "kept"])
        if cut is not None:
            axis.axvline(cut, color="black", linewidth=1, linestyle="--", label="highest score removed")
        axis.set_title(f"{for_plot(kind)}: {(mine & ~kept).sum():,} of {mine.sum():,} removed", loc="left", fontsize=10)
        axis.set_ylabel(_UNITS.get(kind, "groups"))
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_formatter(lambda value, _: f"$10^{{{value:g}}}$")
    axis.set_xlabel(
        "score: importance / parameter" if table.price is None else "score: importance / part of the budget"
    )
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False)
    return figure


def timeline_figure(timeline: Sequence[Mapping[str, Any]], name: str) -> Figure:
    """A validation metric over the steps of the run, and the cuts.

    Args:
        timeline: What was measured, in order: mappings with ``"step"``, ``"stage"`` (``"dense"``, ``"pruned"`` just after a
            cut, or ``"recovery"``) and the metrics.
        name: The metric.
    """
    points = [(p["step"], p[name], p["stage"]) for p in timeline if name in p]
    figure = Figure(figsize=(9, 3), layout="constrained")
    axis = figure.subplots()
    axis.plot([p[0] for p in points], [p[1] for p in points], color=KEPT, marker="o", markersize=4)
    for step in dict.fromkeys(step for step, _, stage in points if stage == "pruned"):
        axis.axvline(step, color=REMOVED, linewidth=1, linestyle="--", label="cut")
    for position, (step, value, stage) in enumerate(points):
        # the last of the dense model, what a cut left, and the last of all
        following = points[position + 1][2] if position + 1 < len(points) else None
        if following is None or stage == "pruned" or (stage == "dense" and following != "dense"):
            # both stand at the step of the cut: one on each side of it
            before_cut = stage == "dense" and following is not None
            axis.annotate(
                f"{value:.4g}",
                (step, value),
                (-6 if before_cut else 6, 6),
                ha="right" if before_cut else "left",
                textcoords="offset points",
                fontsize=9,
                annotation_clip=False,
            )
    axis.margins(x=0.06, y=0.12)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel(for_plot(name))
    values = [p[1] for p in points if math.isfinite(p[1]) and p[1] > 0]
    if values and max(values) > 20 * min(values):
        axis.set_yscale("log")
    axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[:1], labels[:1], frameon=False)
    return figure


_PALETTE = (KEPT, REMOVED, "#7a9e3f", "#8a6fa8")


def trade_off_figure(table: GroupTable) -> Figure:
    """What other budgets would cost: the predicted increase of the loss over each quantity, a curve for each order of cutting.

    Args:
        table: A group table with ``trade_offs``: for each quantity that can be limited, the cuts that are best for it.
    """
    curves = dict(table.trade_offs)
    names = list(curves)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for (order, points), colour in zip(curves.items(), _PALETTE * len(curves), strict=False):
            dense = points[0][name]
            best = order == name
            axis.plot(
                [p[name] / dense for p in points],
                [p["importance"] for p in points],
                color=colour,
                marker="o" if best else None,
                markersize=3,
                linewidth=1.6 if best else 0.9,
                label=f"cut for {for_plot(order)}",
            )
        axis.set_xlabel(f"{for_plot(name)} / dense")
        axis.invert_xaxis()
        axis.set_yscale("symlog", linthresh=max(1e-12, points[-1]["importance"] / 1e4))
        if all(p["importance"] >= 0 for points in curves.values() for p in points):
            axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.supylabel("predicted increase of the loss", fontsize=9)
    return figure


def pictures(
    plan: PruningPlan, table: GroupTable | None, timeline: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Figure]:
    """All the pictures that there is something to draw for, by name.

    Args:
        plan: The plan; of all stages, if there were several.
        table: The group table of the last stage, if it is at hand.
        timeline: As for :func:`timeline_figure`.
    """
    figures: dict[str, Figure] = {}
    if table is not None:
        figures["kept"] = kept_figure(plan, table)
        figures["importance"] = importance_figure(table)
        figures["scores"] = score_figure(table)
        if table.trade_offs:
            figures["trade_off"] = trade_off_figure(table)
    if len(timeline) > 1:
        names = [n for n in timeline[0] if n not in ("step", "stage")]
        preferred = [n for n in names if "perplexity" in n] or names
        if preferred:
            figures["timeline"] = timeline_figure(timeline, preferred[0])
    return figures
