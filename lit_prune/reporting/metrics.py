"""How the figures of a pruned model are called and written, wherever a person meets them."""

from __future__ import annotations

from collections.abc import Mapping

_LABELS = {"parameters": "parameters", "megabytes": "weights on disk, MB", "tokens_per_second": "tokens / s (forward)"}


def label(name: str) -> str:
    """What a figure is called in a table."""
    return _LABELS.get(name, name)


def format_figure(name: str, value: float | None) -> str:
    """A figure as text, with as many digits as it deserves; nothing if there is none."""
    if value is None:
        return ""
    if name == "parameters":
        return f"{value:,.0f}"
    return f"{value:,.1f}" if name in ("megabytes", "tokens_per_second") else f"{value:.4g}"


def figure_rows(figures: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """The figures as text: a heading, and a row a figure with what the last stage has of what the first one had.

    Args:
        figures: Figures by stage and name, the stages in order.
    """
    first, last = next(iter(figures.values()), {}), list(figures.values())[-1] if figures else {}
    rows = [["", *figures, "last / dense" if "dense" in figures else "last / first"]]
    for name in dict.fromkeys(name for values in figures.values() for name in values if name != "speedup"):
        ratio = ""
        if first.get(name) and name in last:
            value = last[name] / first[name]
            if name == "tokens_per_second":
                value = last.get("speedup", value)
            ratio = f"{value:.3f}"
        rows.append([label(name), *(format_figure(name, v.get(name)) for v in figures.values()), ratio])
    return rows
