"""The table and the picture of benchmarks/quality.py, with paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from intervals import mean_over_runs, perplexity, perplexity_ratio

from lit_prune._files import replacing, write_text

REFERENCE = "default"
HUGE = 20
DRAWN = ("default", "best", "fisher", "Wanda-sp", "FLAP", "torch-pruning 1.6.1, Taylor")
Run = Mapping[str, Any]


def report(results: Mapping[str, Any], output: Path) -> None:
    """Write the tables (Markdown) and the picture beside the JSON file."""
    lines = ["# One-shot quality: all rows", "", *_head(results)]
    for measured, dense in results["dense"].items():
        part, domain = measured.split("/")
        runs = [run for run in results["runs"].values() if run["part"] == part and domain in run["losses"]]
        if runs:
            lines += ["", f"## {part.capitalize()} part, {domain} (dense {perplexity(dense):.2f})", ""]
            lines += _table(runs, domain, dense)
    lines += [
        "",
        f"Made by `python benchmarks/quality.py --text {results['protocol'].get('text')} --output docs/quality.json`.",
    ]
    write_text(output.with_name(f"{output.stem}_table.md"), "\n".join(lines) + "\n")
    _draw(results, output.with_suffix(".png"))


def _head(results: Mapping[str, Any]) -> list[str]:
    protocol, looks = results["protocol"], results["looks"]
    return [
        f"Perplexity of {protocol.get('model')} ({protocol.get('parameters', 0):,} parameters) over the dense model's, after"
        f" pruning and without training; {protocol.get('sequences')} calibration sequences of {protocol.get('length')} tokens"
        f" from the first third of {protocol.get('text')}, {protocol.get('windows')} windows of 512 tokens for each domain;"
        " ratios of **all** parameters, tied embeddings included. Mean over calibration seeds (in brackets: how many, where it"
        " is not one). Second line of a cell: perplexity over that of our default at the same ratio, 95% paired bootstrap"
        f" interval over windows. No choice was made on the reporting part; it was measured for {len(looks)} runs, on"
        f" {len({look['date'] for look in looks})} days.",
    ]


def _mean(
    runs: Sequence[Run], row: tuple[str, str], ratio: float, domain: str, seeds: set[int] | None = None
) -> list[float]:
    found = [
        run["losses"][domain]
        for run in runs
        if (run["row"], run["repair"], run["ratio"]) == (*row, ratio) and (seeds is None or run["seed"] in seeds)
    ]
    return mean_over_runs(found) if found else []


def _seeds(runs: Sequence[Run], row: tuple[str, str], ratio: float) -> set[int]:
    return {run["seed"] for run in runs if (run["row"], run["repair"], run["ratio"]) == (*row, ratio)}


def _table(runs: Sequence[Run], domain: str, dense: Sequence[float]) -> list[str]:
    ratios = sorted({run["ratio"] for run in runs})
    reference = next(((r["row"], r["repair"]) for r in runs if r["row"] == REFERENCE), None)
    lines = ["| | " + " | ".join(f"{ratio:.0%}" for ratio in ratios) + " |", "|---" + "|---:" * len(ratios) + "|"]
    for row in dict.fromkeys((run["row"], run["repair"]) for run in runs):
        cells = []
        for ratio in ratios:
            values, seeds = _mean(runs, row, ratio, domain), _seeds(runs, row, ratio)
            if not values:
                cells.append("")
                continue
            over = perplexity(values) / perplexity(dense)
            cell = f"{over:.3f}x" if over < HUGE else f"{over:,.0f}x"
            cell += f" ({len(seeds)})" if len(seeds) > 1 else ""
            common = seeds & _seeds(runs, reference, ratio) if reference else set()
            if reference and row != reference and common and over < HUGE:
                ours = _mean(runs, reference, ratio, domain, common)
                _, low, high = perplexity_ratio(_mean(runs, row, ratio, domain, common), ours)
                cell += f"<br>{low:.3f} to {high:.3f}"
            cells.append(cell)
        name = row[0] if row[1] == "its own" else f"{row[0]}, {'no repair' if row[1] == 'none' else row[1]}"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _draw(results: Mapping[str, Any], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = [run for run in results["runs"].values() if run["part"] == "reporting"]
    dense = results["dense"].get("reporting/wikitext")
    if not dense or not runs:
        return
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axes.axhline(1, color="grey", linestyle=":", label="dense")
    for name in DRAWN:
        found = [run for run in runs if run["row"] == name and run["repair"] in ("its own", "none")]
        points = []
        for ratio in sorted({run["ratio"] for run in found}):
            values = mean_over_runs([r["losses"]["wikitext"] for r in found if r["ratio"] == ratio])
            points.append((100 * ratio, perplexity(values) / perplexity(dense)))
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=3 if name == REFERENCE else 1.5)
    axes.set_yscale("log")
    axes.set_ylim(top=HUGE)
    axes.set_xlabel("parameters removed, %")
    axes.set_ylabel("perplexity over dense")
    axes.set_title("SmolLM2-135M-Instruct after pruning, no training")
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
