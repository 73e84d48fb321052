"""What every command of ``lit-prune`` begins with: a model, its tokenizer, calibration inputs, and a device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_prune.architectures import find_group_sets
from lit_prune.calibration.statistics import Statistics
from lit_prune.calibration_input import Calibration, calibration_inputs, reads_images
from lit_prune.config import PruningConfig
from lit_prune.costs import Costs
from lit_prune.detection import find_or_trace
from lit_prune.errors import ArgumentValueError, PruningError
from lit_prune.group_data import keep_group_sets
from lit_prune.groups import count_bytes, count_parameters
from lit_prune.io.sources import (
    CAUSAL,
    MASKED,
    auto_class_of,
    gguf_file,
    load_image_processor,
    load_model,
    load_tokenizer,
)
from lit_prune.objectives import LABELS, Batch, causal_loss, loss, measure, with_drawn_targets
from lit_prune.phases import CALIBRATION, COMPENSATION, REPAIR, SURGERY, expected_statistics, expected_work
from lit_prune.pipeline import calibrate, prune_with
from lit_prune.plan import PruningPlan
from lit_prune.progress import Progress, Work
from lit_prune.ranking.candidates import masked_loss
from lit_prune.ranking.table import GroupTable
from lit_prune.repairing import repair, unexplained
from lit_prune.surgery.apply import apply_plan

MEASURING, COMPARING = "measuring", "comparing ratios"


class Session:
    """A model, its tokenizer or image processor, and calibration inputs: what every command begins with.

    Args:
        source: The model, see :func:`lit_prune.io.sources.load_model`.
        calibration: What it is calibrated and measured on; ``None`` if nothing is run.
        device: Where to compute.
        dtype: Data type of the weights.
        blocks: Whether whole decoder layers are groups.
        hidden: Whether hidden channels are groups.
        like: A session whose held-out inputs are used, drawn labels included, if it is of the same sort.
    """

    def __init__(
        self,
        source: str,
        calibration: Calibration | None,
        device: str,
        dtype: str,
        *,
        blocks: bool = False,
        hidden: bool = False,
        like: Session | None = None,
    ) -> None:
        self.device = _device(device)
        self.auto_class = auto_class_of(source)
        wanted: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
        if dtype == "auto" and gguf_file(source) is not None:
            wanted = torch.float32
        self.model: Any = load_model(source, dtype=wanted, auto_class=self.auto_class).eval().to(self.device)
        images = reads_images(self.model, self.auto_class)
        self.processor: Any = load_image_processor(source) if images else load_tokenizer(source)
        self.blocks = blocks
        self.progress = Progress(lambda _: [], None)
        self.costs = Costs(lambda name: self.progress.phase(name))
        self.batches: list[Batch] = []
        self.held_out: list[Batch] = []
        if calibration is not None:
            self._take_inputs(calibration, like)
        self.group_sets = find_group_sets(self.model, blocks=blocks, hidden=hidden)

    def _take_inputs(self, calibration: Calibration, like: Session | None) -> None:
        batches, held_out = (
            [self._on_device(b) for b in part]
            for part in calibration_inputs(self.model, self.auto_class, self.processor, calibration)
        )
        self._check_run((batches or held_out)[0])
        generator = torch.Generator().manual_seed(calibration.seed)
        self.batches = [self._with_targets(b, generator) for b in batches]
        shared = like is not None and like.auto_class == self.auto_class and self.auto_class != CAUSAL
        self.held_out = like.held_out if shared and like else [self._with_targets(b, generator) for b in held_out]
        if (found := find_or_trace(self.model, self.batches, self.loss)) is not None:
            keep_group_sets(self.model, found)

    def _on_device(self, batch: Batch) -> Batch:
        floating = self.model.dtype
        return {n: v.to(self.device, floating if v.is_floating_point() else None) for n, v in batch.items()}

    def _check_run(self, batch: Batch) -> None:
        """Run the model once, so that one which cannot run is refused before any work.

        Raises:
            PruningError: With what the model raised.
        """
        inputs = {name: value for name, value in batch.items() if name != LABELS}
        try:
            with torch.inference_mode():
                self.model(**inputs)
        except Exception as error:
            # whatever the code of a model raises
            raise PruningError(
                f"The {type(self.model).__name__} cannot run a calibration batch with {', '.join(inputs)}:"
                f" {type(error).__name__}: {error}"
            ) from error

    def _with_targets(self, batch: Batch, generator: torch.Generator) -> Batch:
        own = self.auto_class != CAUSAL and LABELS not in batch
        return with_drawn_targets(self.model, batch, generator) if own else batch

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch, see :mod:`lit_prune.objectives`."""
        return causal_loss(self.model, batch) if self.auto_class == CAUSAL else loss(self.model, batch)

    @contextlib.contextmanager
    def tracked(self, *work: Work, title: str = "Pruning") -> Iterator[None]:
        """Show one progress bar over some work, all of which is done within."""
        with Progress(lambda _: work, title=title) as self.progress:
            self.progress.known(len(self.batches))
            yield

    @property
    def measuring(self) -> Work:
        """What :meth:`metrics` is expected to take."""
        return Work(MEASURING, len(self.held_out), len(self.held_out))

    def pruning(self, config: PruningConfig) -> list[Work]:
        """What :meth:`prune` is expected to take."""
        return expected_work(self.model, self.group_sets, config, len(self.batches))

    def calibrating(self, config: PruningConfig) -> list[Work]:
        """What :meth:`statistics` is expected to take."""
        return expected_statistics(self.model, self.group_sets, config, len(self.batches))

    def cutting(self, config: PruningConfig) -> list[Work]:
        """What :meth:`cut` is expected to take."""
        return [w for w in self.pruning(config)[1:] if w.phase == REPAIR or (w.phase == CALIBRATION and _folds(config))]

    def prune(self, config: PruningConfig) -> tuple[GroupTable, PruningPlan]:
        """Calibrate, plan, repair and cut, as the callback does."""
        return prune_with(self.model, self._data, config, progress=self.progress.layers, costs=self.costs)

    def statistics(self, config: PruningConfig) -> Statistics:
        """Calibrate once, and measure what the repair could make up for."""
        config.check(self.model, self.group_sets)
        with self.costs.phase(CALIBRATION, self.device), self._data(CALIBRATION) as (batches, loss_fn):
            statistics = calibrate(self.model, self.group_sets, batches, loss_fn, config)
        if config.compensates:
            with self.costs.phase(COMPENSATION, self.device):
                data = partial(self._data, COMPENSATION)
                statistics.unexplained = unexplained(
                    self.model, self.group_sets, data, None, self.progress.layers, None
                )
        return statistics

    def masked_loss(self, made: PruningPlan) -> float:
        """The loss on the held-out inputs with what a plan removes masked."""
        with self.progress.phase(COMPARING):
            batches = self.progress.batches(self.held_out)
            return masked_loss(self.model, self.group_sets, made, batches, self.loss, lambda _: False)

    def cut(self, made: PruningPlan, config: PruningConfig) -> None:
        """Repair and cut by a plan that is there already."""
        statistics = Statistics()
        if _folds(config):
            with self.costs.phase(CALIBRATION, self.device), self._data(CALIBRATION) as (batches, loss_fn):
                statistics = calibrate(self.model, self.group_sets, batches, loss_fn, config)
        with self.costs.phase(REPAIR, self.device):
            made, weights = repair(
                self.model,
                self.group_sets,
                made,
                statistics,
                self.batches,
                self.loss,
                config,
                progress=self.progress.layers,
            )
        with self.costs.phase(SURGERY, self.device):
            apply_plan(self.model, made, weights=weights)

    def _data(self, _: str) -> contextlib.AbstractContextManager[tuple[Iterable[Batch], Callable[[Batch], Tensor]]]:
        return contextlib.nullcontext((self.progress.batches(self.batches), self.loss))

    def metrics(self) -> dict[str, float]:
        """Parameters, megabytes, and what is measured on the held-out inputs."""
        metrics = {"parameters": float(count_parameters(self.model)), "megabytes": count_bytes(self.model) / 1e6}
        if self.held_out:
            with self.progress.phase(MEASURING):
                shown: Any = self.progress.batches(self.held_out)
                causal, masked = self.auto_class == CAUSAL, self.auto_class == MASKED
                metrics |= measure(self.model, shown, causal=causal, masked=masked)
        return metrics


def _folds(config: PruningConfig) -> bool:
    return config.repair == "bias"


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
