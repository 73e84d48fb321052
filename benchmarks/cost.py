"""What pruning costs: time and memory of calibration, planning and cutting, and how fast the smaller model really is.

Every row runs in a process of its own and is added to a JSON file as it comes; rows that are in it are not measured again.
Ratios are between cases that take turns within one row. The models are Llamas with random weights.

    python benchmarks/cost.py --output docs/cost.json               # all of it, and docs/cost.md beside it
    python benchmarks/cost.py --sections memory speed --device cuda --dtype bfloat16 --output outputs/cost_gpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from common import (
    GIGABYTE,
    LARGE,
    machine,
)
from cost_calibration import calibration, report_calibration
from cost_memory import MEMORY_CASES, OFFLOADED, SIZES, memory, report_memory
from cost_peer import peer, report_peer
from cost_planning import planning, report_planning
from cost_pruning import WHOLE, pruning, pruning_memory, report_pruning, report_pruning_memory
from cost_speed import RATIOS, depth, report_depth, report_speed, speed
from cost_widths import report_widths, widths
from results import write_json

from lit_prune._files import write_text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/cost.json"), help="JSON file; added to")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each case, after one that warms up")
    parser.add_argument("--batches", type=int, default=3, help="calibration batches")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a calibration batch")
    parser.add_argument("--row", nargs=2, metavar=("SECTION", "KEY"), help="measure one row and print it; used inside")
    return parser.parse_args()


class Section(NamedTuple):
    measure: Callable[[str, argparse.Namespace], dict[str, Any]]
    keys: Sequence[str]
    report: Callable[[Mapping[str, Any]], str]


SECTIONS = {
    "calibration": Section(calibration, ["100M"], report_calibration),
    "memory": Section(memory, [f"{size}: {case}" for size in SIZES for case in MEMORY_CASES], report_memory),
    "planning": Section(planning, [*SIZES, *LARGE], report_planning),
    "pruning": Section(pruning, list(WHOLE), report_pruning),
    "pruning memory": Section(pruning_memory, list(WHOLE), report_pruning_memory),
    "peer": Section(peer, ["lit_prune", "torch-pruning"], report_peer),
    "speed": Section(speed, [f"{r:.0%}" for r in RATIOS], report_speed),
    "depth": Section(depth, ["20%", "30%"], report_depth),
    "widths": Section(widths, ["512 tokens", "1 token"], report_widths),
}


# bytes that have to be free before a row begins
NEEDS = {"700M": 14 * GIGABYTE}


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    if options.row:
        section, key = options.row
        print(json.dumps(SECTIONS[section].measure(key, options)))
        return
    results: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    results.setdefault("machine", machine(options))
    left = []
    for section in options.sections:
        rows = results.setdefault(section, {})
        for key in SECTIONS[section].keys:
            # a CPU has nowhere to offload gradients to
            if key in rows or (options.device == "cpu" and key.endswith(OFFLOADED)):
                continue
            start = time.perf_counter()
            row = measure(section, key, options)
            if row is None:
                left.append(f"{section} | {key}")
                continue
            rows[key] = {**row, "row_seconds": time.perf_counter() - start, "date": time.strftime("%Y-%m-%d")}
            write_json(options.output, results)
            print(f"{section} | {key}: {rows[key]['row_seconds']:.0f} s", flush=True)
    text = report(results)
    write_text(options.output.with_suffix(".md"), text)
    print(text)
    if left:
        sys.exit(f"Not measured: {', '.join(left)}. Run again; what is there stays.")


def measure(section: str, key: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """Measure a row in a process of its own; ``None`` if it could not be."""
    needed = NEEDS.get(key.partition(":")[0], 0)
    free = psutil.virtual_memory().available
    if options.device == "cpu" and free < needed:
        print(f"{section} | {key}: {free / GIGABYTE:.0f} GB are free, {needed / GIGABYTE:.0f} are needed", flush=True)
        return None
    command = [sys.executable, __file__, "--row", section, key]
    for name in ("device", "dtype", "threads", "repeats", "batches", "tokens"):
        command += [f"--{name}", str(getattr(options, name))]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(options.threads)}
    if section in ("memory", "planning", "pruning memory", "peer"):
        # freed tensors go back to the system at once, so that the resident set is what is in use
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{section} | {key} failed:\n{done.stderr[-2000:]}", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def report(results: Mapping[str, Any]) -> str:
    rows = [row for name in SECTIONS for row in results.get(name, {}).values()]
    of_machine = results["machine"]["date"]
    dates = [row.get("date", of_machine) for row in rows] or [of_machine]
    shown = {**results["machine"], "date": " to ".join(dict.fromkeys((min(dates), max(dates))))}
    about = ", ".join(f"{key} {value}" for key, value in shown.items())
    parts = [
        "# What pruning costs\n",
        f"Made by `python benchmarks/cost.py --output docs/cost.json`: {about}. Llamas with random weights, a process for"
        " each row. Ratios are medians of rounds in which the cases take turns; in brackets the lowest and highest. With"
        " `--device cuda` the same command measures a GPU; none of these figures"
        + (" was run on one.\n" if "cuda" not in results["machine"]["device"] else " is of a CPU.\n"),
    ]
    parts += [part.report(results[name]) for name, part in SECTIONS.items() if results.get(name)]
    return "\n".join(parts)


if __name__ == "__main__":
    main()
