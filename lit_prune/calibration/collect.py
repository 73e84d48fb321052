"""Runs calibration batches and collects what the terms of a criterion need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.calibration.accumulator import _Accumulator
from lit_prune.calibration.evaluation import evaluation_mode
from lit_prune.calibration.observers import Observers, PassRecorder
from lit_prune.calibration.statistics import (
    SKIPPED,
    Statistics,
    check_gathering,
)
from lit_prune.calibration.terms import Term
from lit_prune.calibration.weight_gradients import _everywhere
from lit_prune.distributed import shards
from lit_prune.distributed.ranks import Ranks
from lit_prune.errors import CalibrationError
from lit_prune.groups import GroupSet, check_names


def collect_statistics(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    batches: Iterable[Any],
    loss_fn: Callable[[Any], Any],
    terms: Iterable[Term],
    *,
    mode: str = "streaming",
    activations: bool = False,
    gradient_dtype: str = "float32",
    offload_gradients: bool = False,
    root: nn.Module | None = None,
    ranks: Ranks | None = None,
    recorder: PassRecorder | None = None,
) -> Statistics:
    """Run calibration batches and collect what the terms of a criterion need.

    The model is put in eval mode, only those of its parameters that are scored by their gradients require gradients
    meanwhile (other parameters of ``root`` keep their flags), and everything (modes, flags, gradients that were there,
    hooks) is put back, also when an error is raised.

    Args:
        model: The model that ``group_sets`` describe.
        group_sets: The group sets to collect for.
        batches: The calibration batches; each is one micro-batch of the mean over batches.
        loss_fn: Runs one batch through the model and returns its loss, a scalar; or :data:`SKIPPED` for a batch that is
            not to count. ``None`` means the same where gradients are needed; elsewhere the batch counts without a loss.
            In a distributed run a batch that one process skips is skipped by all.
        terms: The terms whose statistics are needed.
        mode: ``"streaming"`` or ``"elementwise"``.
        activations: Observe all sums of the projections' inputs even if no term asks for them.
        gradient_dtype: What gradients are accumulated in, where a term needs them element by element: ``"float32"``, or
            ``"bfloat16"`` for half the memory and a mean of about two decimal digits.
        offload_gradients: Accumulate them in CPU memory, copied there while the device computes on. ``"elementwise"``
            always does.
        root: The module that holds the model and computes the loss, if there is more to it than the model: its modes
            and gradients are guarded as well.
        ranks: The processes of a distributed run, each of which calls this with its own batches. A batch is then the
            batches of all of them together, its gradient their mean, as in training; calibration ends with the first
            process that has no more. Every process gets the same statistics, or an error.
        recorder: Records the pass as well, for a repair for instance, see :class:`lit_prune.repair.recording.Recording`.

    Raises:
        CalibrationError: If there is no batch or all are skipped, a loss is no scalar or does not depend on the
            parameters, or a loss or gradient is not finite; the message names the batch and the parameter.
        UnsupportedModelError: If the group sets are of another model.
        ValueError: For an unknown mode or dtype.
    """
    check_gathering(mode, gradient_dtype)
    check_names(model, group_sets)
    root = model if root is None else root
    shards.reshard(root)
    accumulator = _Accumulator(getattr(torch, gradient_dtype), offload_gradients or mode == "elementwise")
    observers = Observers(
        model,
        root,
        group_sets,
        terms,
        mode=mode,
        activations=activations,
        accumulator=accumulator,
        ranks=ranks,
        recorder=recorder,
    )
    statistics = Statistics()
    losses: list[Tensor | None] = []
    with evaluation_mode(root), observers, torch.set_grad_enabled(observers.gradients):
        for number, batch in enumerate(_together(batches, ranks)):
            observers.start_batch(batch)
            loss = loss_fn(batch)
            counts = loss is not SKIPPED and not (observers.gradients and loss is None)
            if not _everywhere(counts, ranks):
                statistics.skipped += 1
                observers.skip_batch()
                del loss
                continue
            if observers.gradients:
                losses.append(_checked_loss(loss, number, ranks).detach())
            else:
                losses.append(loss.detach().double().mean() if isinstance(loss, Tensor) else None)
            observers.end_batch(loss)
            statistics.batches += 1
            del loss
    if statistics.batches == 0:
        raise CalibrationError(_nothing_to_calibrate_on(statistics.skipped))
    statistics.loss = _mean_loss(losses, ranks)
    observers.finish(statistics)
    return statistics


def _nothing_to_calibrate_on(skipped: int) -> str:
    if skipped == 0:
        return "The calibration dataloader gave no batch; expected at least one."
    return (
        f"All {skipped} calibration batches were skipped, because none had a loss for the model that is pruned; expected at"
        " least one. Let the training step return a loss (or call manual_backward with one that depends on the model) in"
        " calibration, where the module is in eval mode, or give other calibration batches."
    )


def _mean_loss(losses: Sequence[Tensor | None], ranks: Ranks | None) -> float | None:
    """The mean of the losses that there are, over all batches of all processes; ``None`` if there are none.

    Raises:
        CalibrationError: If one is not finite.
    """
    device = next((loss.device for loss in losses if loss is not None), torch.device("cpu"))
    nothing = torch.zeros((), dtype=torch.float64, device=device)
    # by batch, a line of losses and a line of how many there are: a process without any takes part all the same
    both = torch.stack(
        [
            torch.stack([nothing if loss is None else loss.double().reshape(()) for loss in losses]),
            torch.tensor([loss is not None for loss in losses], dtype=torch.float64, device=device),
        ]
    )
    values, counts = (both if ranks is None else ranks.sum(both)).cpu()
    means = values / counts.clamp_min(1)
    if not bool(means.isfinite().all()):
        number = int((~means.isfinite()).nonzero()[0])
        raise CalibrationError(
            f"The loss of calibration batch {number} is {float(means[number])}; expected a finite number."
            " Nothing was pruned."
        )
    return float(values.sum() / counts.sum()) if bool(counts.any()) else None


def _together(batches: Iterable[Any], ranks: Ranks | None) -> Iterator[Any]:
    """The batches, for as long as every process has one."""
    iterator = iter(batches)
    end = object()
    while True:
        batch = next(iterator, end)
        if not _everywhere(batch is not end, ranks):
            return
        yield batch


def _checked_loss(loss: Any, number: int, ranks: Ranks | None) -> Tensor:
    fine = isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad
    if _everywhere(fine, ranks):
        assert isinstance(loss, Tensor)
        return loss
    if fine:
        raise CalibrationError(f"Calibration batch {number} gave no usable loss on another process, which says why.")
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise CalibrationError(f"Calibration batch {number} gave no scalar loss; found {found}.")
    raise CalibrationError(
        f"The loss of calibration batch {number} does not depend on the weights to be pruned, so their gradients are"
        " unknown. Was it detached, or computed under no_grad, or within torch.utils.checkpoint(use_reentrant=True)? Only with"
        " use_reentrant=False do gradients reach weights behind frozen ones."
    )
