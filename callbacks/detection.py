"""Which model a LightningModule holds, and its groups where no description covers it: found by running a training step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lit_prune.architectures.registry import find_model, has_groups, submodule
from lit_prune.callbacks.calibration import calibration
from lit_prune.callbacks.packages import is_a
from lit_prune.callbacks.protocol import Pruning
from lit_prune.callbacks.ranks import ranks_of
from lit_prune.callbacks.training_step import TrainingStep
from lit_prune.detection import ATTEMPTS, find_or_trace
from lit_prune.group_data import keep_group_sets
from lit_prune.torch_internals import COMPILED_FROM


def model_in(module: nn.Module, path: str | None = None) -> tuple[str, nn.Module]:
    """The model inside a module, and its qualified name there; also one whose groups are not known yet.

    The model is what a description covers, or what groups are kept of. Where there is neither it is the module at ``path``,
    or, of a LightningModule, the one part that holds all weights that are trained, if there is such a part.

    Raises:
        UnsupportedModelError: If nothing is at ``path``, or there are several models.
    """
    found = submodule(module, path)
    if has_groups(found):
        return find_model(module, path)
    part = _trained_part(found) if is_a(found, pl.LightningModule) else ""
    return ".".join(name for name in (path, part) if name), found.get_submodule(part)


def _trained_part(module: nn.Module) -> str:
    """Name of the child that holds all parameters of a module that are trained; empty if they are spread."""
    trained = [n for n, m in module.named_children() if n not in _frozen_parts(module) and _has_parameters(m)]
    if len(trained) != 1 or any(True for _ in module.parameters(recurse=False)):
        return ""
    compiled = hasattr(module.get_submodule(trained[0]), COMPILED_FROM)
    return f"{trained[0]}.{COMPILED_FROM}" if compiled else trained[0]


def _frozen_parts(module: nn.Module) -> list[str]:
    """Names of the children that are not trained, teachers and networks that a loss is made of, where others are."""
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return []
    return [
        n for n, m in module.named_children() if _has_parameters(m) and not any(p.requires_grad for p in m.parameters())
    ]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def find_groups(pruning: Pruning, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Run the training step on the first calibration batch to find the groups of the model, unless they are known.

    Raises:
        CalibrationError: If there is no batch.
        RankMismatchError: If the processes found other groups.
        UnsupportedModelError: If nothing in the model can be pruned.
    """
    path, model = model_in(pl_module, pruning.model_path)
    if has_groups(model):
        return
    frozen = _frozen_parts(pl_module) if pruning.model_path is None else []
    if frozen:
        rank_zero_warn(
            f"{', '.join(map(repr, frozen))} of {type(pl_module).__name__} are not trained, and stay whole: what is pruned is"
            f" {repr(path) if path else 'the rest'}. Give StructuredPruning(model_path=...) to prune another part."
        )
    with calibration(trainer, model, pruning.calibration_dataloader, ATTEMPTS) as (batches, step):
        # so that what is masked and what is cut can be compared
        step.without_autocast()
        repeated = _Repeated(step)
        found = find_or_trace(
            model,
            map(repeated.take, batches),
            repeated,
            root=pl_module,
            ranks=ranks_of(trainer),
            protect=[rf"^{re.escape(name)}(\.|$)" for name in frozen] if model is pl_module else (),
        )
    assert found is not None
    # afterwards: calibration leaves no attribute of the module behind
    keep_group_sets(model, found)
    pruning.runs.traced(path)
    pruning.runs.bind(model, pruning.config.limits)


class _Repeated:
    """The training step on one batch, as often as is asked for, with the same items every time."""

    def __init__(self, step: TrainingStep) -> None:
        self._step = step

    @staticmethod
    def take(batch: Any) -> Any:
        """The batch, in a form that can be run several times."""
        return _Rewinding(batch) if isinstance(batch, Iterator) else batch

    def __call__(self, batch: Any) -> Any:
        """The loss of a batch."""
        return self._step(batch.rewound() if isinstance(batch, _Rewinding) else batch)


class _Rewinding:
    """An iterator over batches that a step takes (``dataloader_iter``), to be read from its beginning again."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self._read: list[Any] = []

    def rewound(self) -> Iterator[Any]:
        """The items from the first one on."""
        position = 0
        while True:
            if position == len(self._read):
                try:
                    self._read.append(next(self._iterator))
                except StopIteration:
                    return
            yield self._read[position]
            position += 1
