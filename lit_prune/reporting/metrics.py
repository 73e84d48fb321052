"""Labels and number formats of a pruned model's metrics, the same in tables, cards and reports."""

from __future__ import annotations

from collections.abc import Mapping

_LABELS = {
    "parameters": "parameters",
    "megabytes": "weights on disk, MB",
    "tokens_per_second": "tokens / s (forward)",
    "masked_perplexity": "perplexity of masked tokens",
    "agreement": "agreement with the dense model",
    "relative_error": "relative error of the outputs",
    "prefill_ms": "prefill, ms",
    "prefill_ms_spread": "  half of the interquartile range",
    "decode_ms": "decode, ms / token",
    "decode_ms_spread": "  half of the interquartile range",
    "forward_ms": "forward, ms",
    "forward_ms_spread": "  half of the interquartile range",
    "peak_memory": "peak memory, MB",
}


def label(name: str) -> str:
    """The label of a metric in a table."""
    return _LABELS.get(name, name)


def format_metric(name: str, value: float | None) -> str:
    """A metric's value as text, with a suitable number of digits; empty if there is none."""
    if value is None:
        return ""
    if name == "parameters":
        return f"{value:,.0f}"
    return f"{value:,.1f}" if name in ("megabytes", "tokens_per_second", "peak_memory") else f"{value:.4g}"


def metric_rows(metrics: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """The metrics as text: a heading, and one row for each metric with the ratio of the last stage to the first.

    Args:
        metrics: Metrics by stage and name, the stages in order.
    """
    first, last = next(iter(metrics.values()), {}), list(metrics.values())[-1] if metrics else {}
    rows = [["", *metrics, "last / dense" if "dense" in metrics else "last / first"]]
    for name in dict.fromkeys(name for values in metrics.values() for name in values if name != "speedup"):
        ratio = ""
        if first.get(name) and name in last:
            value = last[name] / first[name]
            if name == "tokens_per_second":
                value = last.get("speedup", value)
            ratio = f"{value:.3f}"
        rows.append([label(name), *(format_metric(name, v.get(name)) for v in metrics.values()), ratio])
    return rows
