"""All of ``prune``, here and in another checkout of this project, the two taking turns; and how far their results are apart."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from common import BARE, Peak, bare, build, loss_of, make_batches, markdown, synchronize
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent.parent

# sequences of 128 tokens, each a batch of its own, as a calibration on a small device has them
LENGTH = 128

MEASURED = ("wall", "cpu")


def measure_prune(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of one pruning with the defaults by the ``lit_prune`` that is imported.

    Args:
        case: ``"MODEL FILE"``: a size of :data:`common.SHAPES` with random weights or what ``load_model`` takes; the file that
            the result is written into.
        options: Options of the benchmark.
    """
    from lit_prune import PruningConfig, find_group_sets, prune

    name, path = case.split(" ")
    model, data = _model_and_batches(name, options)
    loss = loss_of(model)
    group_sets = find_group_sets(model)
    peak = Peak(options)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rows: dict[str, Any] = {}
    for kind, drop in ((BARE, False), (f"{BARE}, gradients dropped", True)):
        # the first time sets up threads and caches
        bare(model, group_sets, data[:1], drop=drop)
        before = peak.start()
        rows[kind] = _timed(lambda drop=drop: bare(model, group_sets, data, drop=drop), options)
        rows[kind]["peak"] = peak.bytes() - before + weights
    before = peak.start()
    found: list[Any] = []
    config = PruningConfig(pruning_ratio=0.2)
    rows["prune"] = _timed(lambda: found.extend(prune(model, data, loss, config)), options)
    rows["prune"]["peak"] = peak.bytes() - before + weights
    plan = [[e.name, e.kind, list(e.kept)] for e in found[1].entries]
    torch.save({"plan": plan, "weights": model.state_dict()}, path)
    return {"tokens": len(data) * LENGTH, "weights": weights, **rows}


def _model_and_batches(name: str, options: argparse.Namespace) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    count = options.tokens // LENGTH
    if options.text is None:
        model = build(name, options)
        vocabulary = model.get_input_embeddings().num_embeddings
        return model, [ids % vocabulary for ids in make_batches(options, count, LENGTH)]
    from lit_prune.io.sources import load_model, load_tokenizer

    model = load_model(name).to(options.device, getattr(torch, options.dtype)).eval()
    ids = load_tokenizer(name)(options.text.read_text()[: 8 * options.tokens], return_tensors="pt").input_ids[0]
    if len(ids) < count * LENGTH:
        sys.exit(f"{options.text} has {len(ids)} tokens; expected {count * LENGTH}.")
    return model, list(ids[: count * LENGTH].view(count, 1, LENGTH).to(options.device))


def _timed(action: Any, options: argparse.Namespace) -> dict[str, float]:
    synchronize(options)
    counter = FlopCounterMode(display=False) if options.flops else contextlib.nullcontext()
    wall, cpu = time.perf_counter(), time.process_time()
    with counter:
        action()
    synchronize(options)
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return seconds | ({"flops": float(counter.get_total_flops())} if isinstance(counter, FlopCounterMode) else {})


def _worker(root: Path, name: str, path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure in a process of its own, with the ``lit_prune`` of a checkout."""
    command = [sys.executable, __file__, "--measure", f"{name} {path}"]
    for option in ("device", "dtype", "threads", "tokens"):
        command += [f"--{option}", str(getattr(options, option))]
    command += ["--text", str(options.text)] if options.text is not None else []
    command += ["--flops"] if options.flops else []
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(options.threads),
    }
    if options.memory:
        # freed tensors go back to the system at once, so that the resident set is what is in use
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{root}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _apart(files: Mapping[str, Path]) -> dict[str, Any]:
    """Whether two results keep the same groups, and the largest difference of a weight, relative to its tensor's largest."""
    here, there = (torch.load(path, weights_only=True) for path in files.values())
    same = here["plan"] == there["plan"]
    largest = None
    if same:
        pairs = ((value.double(), there["weights"][key].double()) for key, value in here["weights"].items())
        largest = max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs if a.numel())
    return {"same_plan": same, "largest_relative_difference": largest}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Measure both checkouts, taking turns."""
    roots = {"here": HERE, "baseline": options.baseline.resolve()}
    rows: dict[str, list[Any]] = {name: [] for name in roots}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.pt" for name in roots}
        for repeat in range(options.repeats):
            order = list(roots)[:: 1 if repeat % 2 else -1]
            for name in order:
                rows[name].append(_worker(roots[name], options.model, files[name], options))
                row = rows[name][-1]
                print(f"{name}: {row['prune']['wall']:.1f} s, {row['prune']['cpu']:.1f} s of CPU time", flush=True)
        apart = _apart(files)
    return {
        "model": options.model,
        "tokens": rows["here"][0]["tokens"],
        "threads": options.threads,
        **apart,
        "rows": rows,
    }


def report_baseline(found: Mapping[str, Any]) -> str:
    """A table in Markdown of what :func:`compare` gives."""
    rows = found["rows"]
    table = []
    for name, of_one in rows.items():
        row = [name]
        for clock in MEASURED:
            row.append(f"{statistics.median(r['prune'][clock] for r in of_one):.1f}")
            row.append(f"{statistics.median(r['prune'][clock] / r[BARE][clock] for r in of_one):.2f}")
        for kind in (BARE, f"{BARE}, gradients dropped"):
            row.append(f"{statistics.median(r['prune']['peak'] / r[kind]['peak'] for r in of_one):.2f}")
        table.append(row)
    heads = (
        "",
        "seconds",
        "of the bare pass",
        "CPU seconds",
        "of the bare pass's",
        "peak of the bare pass's",
        "gradients dropped",
    )
    text = markdown(heads, table)
    for clock in (*MEASURED, *(["flops"] if "flops" in rows["here"][0]["prune"] else [])):
        pairs = zip(rows["baseline"], rows["here"], strict=True)
        ratios = [there["prune"][clock] / here["prune"][clock] for there, here in pairs]
        text += (
            f"\n{clock} time: {statistics.median(ratios):.2f} times faster ({min(ratios):.2f} to {max(ratios):.2f})."
        )
    difference = found["largest_relative_difference"]
    return text + (
        f"\n\nThe same groups are kept: {found['same_plan']}."
        + (f" Weights differ by {difference:.1e} of a tensor's largest at most." if difference is not None else "")
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, help="root of the other checkout")
    parser.add_argument(
        "--model", default="135M", help="a size with random weights, or with --text what load_model takes"
    )
    parser.add_argument("--text", type=Path, help="calibration text; random tokens if left out")
    parser.add_argument("--output", type=Path, default=Path("outputs/cost_baseline.json"))
    parser.add_argument("--repeats", type=int, default=2, help="runs of each checkout")
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--flops",
        action="store_true",
        help="count products as well, which a busy machine does not change; slows the clocks",
    )
    parser.add_argument(
        "--memory", action="store_true", help="give freed memory back at once, so that peaks are told; slows the clocks"
    )
    parser.add_argument("--measure", help="measure once and print it; used inside")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        print(json.dumps(measure_prune(options.measure, options)))
        return
    if options.baseline is None or not (options.baseline / "lit_prune").is_dir():
        parser.error(f"--baseline must be the root of a checkout, with a folder lit_prune; found {options.baseline}.")
    found = compare(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(report_baseline(found))


if __name__ == "__main__":
    main()
