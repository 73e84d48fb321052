"""What the callback costs once it has pruned: steps per second against the same small model trained without it.

One run in two has the callback, which prunes before the first step; the other begins with the same pruned model and has no
callback. Runs alternate, so that a machine that is busy for a while slows both; steps are timed one by one, and the first
ones of every run, in which pruning falls, are left out. CPU seconds say what the process itself did; wall-clock seconds what
it waited for other processes as well.

    python benchmarks/callback_cost.py --output docs/callback_cost.json
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from results import write_json
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_prune.callbacks import StructuredPruning
from lit_prune.groups import count_parameters

WARM_UP = 5


class Module(pl.LightningModule):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch, use_cache=False).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Clock(pl.Callback):
    """Seconds from the start of one batch to the start of the next, by the wall and of the CPU, all hooks included."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))

    def medians(self) -> tuple[float, float]:
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(self.marks[WARM_UP:])]
        return statistics.median(wall for wall, _ in steps), statistics.median(cpu for _, cpu in steps)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/callback_cost.json"), help="JSON file")
    parser.add_argument("--pairs", type=int, default=8, help="runs with and runs without the callback")
    parser.add_argument("--steps", type=int, default=40, help="steps of a run")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model")
    return parser.parse_args()


def seconds_per_step(
    model: torch.nn.Module, data: torch.Tensor, steps: int, *callbacks: pl.Callback
) -> tuple[float, float]:
    clock = Clock()
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, *callbacks],
    )
    trainer.fit(Module(model), DataLoader(data, batch_size=4))
    return clock.medians()


def main() -> None:
    options = arguments()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1024,
    )
    dense = AutoModelForCausalLM.from_config(config)
    data = torch.randint(0, 1024, (4 * options.steps, 64))

    def callback() -> StructuredPruning:
        return StructuredPruning("taylor", pruning_ratio=0.3, step=0, calibration_batches=4)

    small = copy.deepcopy(dense)
    seconds_per_step(small, data, WARM_UP + 2, callback())
    times: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
    for pair in range(options.pairs):
        # the order changes as well: whoever comes second would meet warmer caches
        for kind in ("with", "without") if pair % 2 else ("without", "with"):
            model, extra = (dense, [callback()]) if kind == "with" else (small, [])
            times[kind].append(seconds_per_step(copy.deepcopy(model), data, options.steps, *extra))
    result: dict[str, Any] = {
        "parameters": count_parameters(small),
        "parameters_dense": count_parameters(dense),
        "pairs": options.pairs,
        "steps": options.steps - WARM_UP - 1,
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    table = Table("seconds", "steps per second with", "without", "with / without", "pairs", "without / without")
    for position, clock in enumerate(("wall", "cpu")):
        rates = {kind: [1 / run[position] for run in runs] for kind, runs in times.items()}
        ratios = [a / b for a, b in zip(rates["with"], rates["without"], strict=True)]
        noise = [a / b for a, b in itertools.pairwise(rates["without"])]
        middle = {kind: statistics.median(values) for kind, values in rates.items()}
        result[clock] = {
            "steps_per_second": rates,
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "noise": [min(noise), max(noise)],
        }
        table.add_row(
            clock,
            f"{middle['with']:.2f}",
            f"{middle['without']:.2f}",
            f"{statistics.median(ratios):.3f}",
            f"{min(ratios):.3f} to {max(ratios):.3f}",
            f"{min(noise):.3f} to {max(noise):.3f}",
        )
    write_json(options.output, result)
    Console().print(table)


if __name__ == "__main__":
    main()
