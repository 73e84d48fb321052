"""What every command of ``lit-prune`` begins with: a model, its tokenizer, a calibration text, and a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lit_prune.architectures import find_group_sets
from lit_prune.arguments import BIGGEST, COUNT, INTEGER, NATURAL, TEXT, check_fields, count, either, sequence_of
from lit_prune.calibration.statistics import Statistics
from lit_prune.config import PruningConfig
from lit_prune.costs import Costs
from lit_prune.errors import ArgumentValueError, PruningError
from lit_prune.groups import count_bytes, count_parameters
from lit_prune.pipeline import CALIBRATION, REPAIR, SURGERY, calibrate, prune_with
from lit_prune.plan import PruningPlan
from lit_prune.ranking.table import GroupTable
from lit_prune.repairing import repair
from lit_prune.surgery.apply import apply_plan


@dataclass(frozen=True)
class Calibration:
    """The text that calibration runs on, and how much of it.

    Args:
        text: A text, JSON, CSV or Parquet file, or several as a list; python-docs for the documentation that every Python
            ships.
        batches: Number of calibration batches.
        batch_size: Sequences of a batch.
        block_size: Tokens of a sequence.
        held_out: Sequences from the end of the text to measure perplexity on, before and after; 0 measures nothing.
        seed: Seed of the choice of calibration sequences.
    """

    text: str | list[str] = "python-docs"
    batches: int = 32
    batch_size: int = 1
    block_size: int = 128
    held_out: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ArgumentTypeError: If one is of another type.
            ArgumentValueError: If one is out of its range.
        """
        files = either("a path or name, or a list of at least one path", TEXT, sequence_of("paths", TEXT, empty=False))
        counts = {"batches": COUNT, "batch_size": COUNT, "block_size": count(2, BIGGEST), "held_out": NATURAL}
        check_fields(self, {"text": files, **counts, "seed": INTEGER})


class Session:
    """A model, its tokenizer and text: what every command begins with."""

    def __init__(
        self,
        source: str,
        calibration: Calibration,
        device: str,
        dtype: str,
        *,
        blocks: bool = False,
        hidden: bool = False,
    ) -> None:
        from lit_prune.io.sources import gguf_file, load_model, load_tokenizer

        self.device = _device(device)
        wanted: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
        if dtype == "auto" and gguf_file(source) is not None:
            wanted = torch.float32
        self.model: Any = load_model(source, dtype=wanted).eval().to(self.device)
        self.tokenizer = load_tokenizer(source)
        self.group_sets = find_group_sets(self.model, blocks=blocks, hidden=hidden)
        self.calibration = calibration
        self.batches, self.held_out = self._text()
        self.costs = Costs()

    def _text(self) -> tuple[list[Tensor], list[Tensor]]:
        from lit_prune.training.data import load_texts, pack

        options = self.calibration
        loaded = load_texts(options.text)
        documents = loaded.get("train") or next(iter(loaded.values()))
        blocks: Tensor = pack(documents, self.tokenizer, "text", options.block_size)[:]["input_ids"]
        needed = options.batches * options.batch_size
        if len(blocks) < needed + options.held_out:
            raise PruningError(
                f"{options.text} makes {len(blocks)} sequences of {options.block_size} tokens; expected"
                f" {needed} for calibration and {options.held_out} held out. Bring more text, or lower them."
            )
        usable = len(blocks) - options.held_out
        chosen = torch.randperm(usable, generator=torch.Generator().manual_seed(options.seed))[:needed]
        batches = blocks[chosen].to(self.device).split(options.batch_size)
        held_out = blocks[usable:].to(self.device).split(1) if options.held_out else ()
        return list(batches), list(held_out)

    def loss(self, batch: Tensor) -> Tensor:
        """The causal loss of token ids of shape ``(batch, tokens)``."""
        return self.model(input_ids=batch, labels=batch, use_cache=False).loss

    def prune(self, config: PruningConfig) -> tuple[GroupTable, PruningPlan]:
        """Calibrate, plan, repair and cut, as the callback does."""
        return prune_with(self.model, self._data, config, progress=partial(progress, what="Blocks"), costs=self.costs)

    def cut(self, made: PruningPlan, config: PruningConfig) -> None:
        """Repair and cut by a plan that is there already."""
        statistics = Statistics()
        if config.repair == "bias":
            with self.costs.phase(CALIBRATION, self.device), self._data(CALIBRATION) as (batches, loss):
                statistics = calibrate(self.model, self.group_sets, batches, loss, config)
        with self.costs.phase(REPAIR, self.device):
            made, weights = repair(
                self.model,
                self.group_sets,
                made,
                statistics,
                self.batches,
                self.loss,
                config,
                progress=partial(progress, what="Repair"),
            )
        with self.costs.phase(SURGERY, self.device):
            apply_plan(self.model, made, weights=weights)

    def _data(self, purpose: str) -> AbstractContextManager[tuple[Iterable[Tensor], Callable[[Tensor], Tensor]]]:
        shown = progress(self.batches, purpose.capitalize()) if purpose == CALIBRATION else self.batches
        return nullcontext((shown, self.loss))

    @torch.inference_mode()
    def metrics(self) -> dict[str, float]:
        """Parameters, megabytes, and perplexity on the held-out text."""
        metrics = {"parameters": float(count_parameters(self.model)), "megabytes": count_bytes(self.model) / 1e6}
        if self.held_out:
            losses = [float(self.loss(batch)) for batch in progress(self.held_out, "Perplexity")]
            metrics["perplexity"] = math.exp(sum(losses) / len(losses))
        return metrics


def _device(name: str) -> torch.device:
    """The device of that name, the first GPU or the CPU for auto.

    Raises:
        ArgumentValueError: If there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("tensors there hold no values")
        # a device may be named that cannot compute, or not give anything back
        torch.ones(1, device=device).cpu()
    except (AssertionError, RuntimeError, NotImplementedError, ImportError) as error:
        raise ArgumentValueError(
            f"There is no device {name!r} to compute on: {str(error).partition(chr(10))[0].partition('. ')[0]}"
        ) from error
    return device


def progress(items: Sequence[Any], what: str) -> Iterable[Any]:
    """The items, with a bar in a terminal."""
    console = Console(stderr=True)
    return track(items, what, transient=True, console=console, disable=not console.is_terminal)
