"""From a plan to a repaired model: which repair a model gets, and what it could make up for."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from lit_prune.calibration.observers import split_mask_terms
from lit_prune.calibration.statistics import Statistics
from lit_prune.config import AUTO, PruningConfig
from lit_prune.distributed import shards
from lit_prune.distributed.ranks import Ranks, together
from lit_prune.distributed.sharing import shared_work
from lit_prune.errors import UnsupportedModelError
from lit_prune.groups import BLOCK, HIDDEN, GroupSet
from lit_prune.plan import PruningPlan
from lit_prune.repair.bias import bias_fold
from lit_prune.repair.channel_redundancy import unexplained_anywhere
from lit_prune.repair.module_order import refit_in_order
from lit_prune.repair.recording import Recording
from lit_prune.repair.redundancy import unexplained_shares
from lit_prune.repair.refit import DAMPING, least_squares
from lit_prune.repair.replay import is_chain
from lit_prune.repair.stream import refit_narrower, scaled_norms

log = logging.getLogger(__name__)

BatchesAndForward = Callable[
    [], contextlib.AbstractContextManager[tuple[Iterable[Any], Callable[[Any], Tensor | None]]]
]


def recording_of(
    model: nn.Module, group_sets: Sequence[GroupSet], config: PruningConfig, *, dry_run: bool = False
) -> Recording | None:
    """Return what records a calibration pass for the repair, so that no other pass has to be run for it.

    Matrices and outputs that it keeps take no more memory than the gradients of an ordinary backward pass would.

    Args:
        model: The model.
        group_sets: Its group sets.
        config: The configuration.
        dry_run: Whether nothing is going to be repaired.

    Returns:
        ``None`` where nothing is repaired layer by layer.
    """
    repairs = config.repair == "least_squares" and not dry_run
    wanted = (repairs or config.compensates) and not config.limits.hidden
    if not wanted or not is_chain(model, group_sets):
        return None
    # gradients that are kept take that memory
    keeps_gradients = bool(split_mask_terms(config.terms, group_sets)[1])
    limit = 0 if keeps_gradients else gradient_bytes(model)
    return Recording(
        model, group_sets, limit, grams=config.compensates, outputs=repairs, offload=config.offload_hidden_states
    )


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients that a backward pass leaves; of those of all parameters if none is to be trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return shards.held_bytes(trained or model.parameters())


def completed(
    recording: Recording | None,
    data: BatchesAndForward,
    config: PruningConfig,
    root: nn.Module,
    ranks: Ranks | None,
) -> Recording | None:
    """Return a recording of all batches, also of those that calibration held back; ``None`` unless every process has one.

    Args:
        recording: What calibration recorded.
        data: Gives a context with the batches and a function that runs one.
        config: The configuration.
        root: The module that holds the model.
        ranks: The processes of a distributed run.
    """
    if recording is None:
        return None
    if config.importance == AUTO and config.repairs_on_all:
        with data() as (batches, forward), together(ranks, "calibration"):
            held_back = (batch for number, batch in enumerate(batches) if config.holds_back(number))
            recording.record(held_back, forward, root)
    recording.finish()
    usable = recording.usable if ranks is None else ranks.all(recording.usable)
    return recording if usable else None


@contextlib.contextmanager
def _not_held_back(
    data: BatchesAndForward, config: PruningConfig
) -> Iterator[tuple[Iterable[Any], Callable[[Any], Tensor | None]]]:
    """The batches without those that polishing is judged on."""
    with data() as (batches, forward):
        yield config.not_held_back(batches), forward


@contextlib.contextmanager
def _data(
    data: BatchesAndForward, recording: Recording | None
) -> Iterator[tuple[Iterable[Any], Callable[[Any], Tensor | None]]]:
    """The batches, unless there is a recording of them."""
    if recording is not None:
        yield (), lambda _: None
        return
    with data() as found:
        yield found


def unexplained(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    data: BatchesAndForward,
    root: nn.Module | None,
    progress: Callable[[Sequence[str]], Iterable[str]],
    ranks: Ranks | None,
    recording: Recording | None = None,
    offload: bool | None = None,
) -> dict[tuple[str, str], Tensor]:
    """Measure what a repair by least squares could not make up for, by group set: the shares of :func:`unexplained_shares`.

    Args:
        model: The dense model.
        group_sets: Its group sets.
        data: Gives a context with the batches and a function that runs one.
        root: The module that holds the model; ``model`` if ``None``.
        progress: Wraps the sequence of blocks.
        ranks: The processes of a distributed run, each with batches of its own.
        recording: What calibration recorded of the batches, which are not run again then.
        offload: The configuration's ``offload_hidden_states``.

    Returns:
        A share for each group, by the key of its set; nothing for a model that cannot be measured so.
    """
    all_reduce = None if ranks is None else ranks.sum
    what = "measuring unexplained shares"
    group_sets = [s for s in group_sets if s.kind != HIDDEN]
    scored = [s for s in group_sets if s.kind != BLOCK]
    if is_chain(model, scored):
        try:
            with _data(data, recording) as (batches, forward), together(ranks, what), shared_work(ranks):
                return unexplained_shares(
                    model,
                    group_sets,
                    batches,
                    forward,
                    root=root,
                    progress=progress,
                    all_reduce=all_reduce,
                    recording=recording,
                    offload=offload,
                )
        except UnsupportedModelError:
            pass
    try:
        with together(ranks, what), shared_work(ranks):
            return unexplained_anywhere(model, scored, data, root=root, all_reduce=all_reduce)
    except UnsupportedModelError:
        # such a model is not repaired either, of which repair warns
        return {}


def repair(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    plan: PruningPlan,
    statistics: Statistics,
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    config: PruningConfig,
    *,
    root: nn.Module | None = None,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
    ranks: Ranks | None = None,
) -> tuple[PruningPlan, dict[str, Tensor]]:
    """Compute new weights for the layers that read the removed groups; the model is not changed.

    Args:
        model: The dense model.
        group_sets: Its group sets.
        plan: The plan.
        statistics: What calibration collected.
        batches: The calibration batches once more; read only by ``"least_squares"``, in several passes where the model is no
            chain of blocks.
        forward: Runs one batch through the model.
        config: The configuration.
        root: The module that holds the model, if ``forward`` runs more than the model.
        progress: Wraps the sequence of blocks.
        ranks: The processes of a distributed run, each with batches of its own.

    Returns:
        The plan, with biases that the repair adds, and the new weights, both for :func:`lit_prune.apply_plan`. A model
        that cannot be repaired gets a warning and no new weights.
    """

    def data() -> contextlib.AbstractContextManager[tuple[Iterable[Any], Callable[[Any], Any]]]:
        return contextlib.nullcontext((batches, forward))

    return repaired(model, group_sets, plan, statistics, data, config, root=root, progress=progress, ranks=ranks)


def repaired(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    plan: PruningPlan,
    statistics: Statistics,
    data: BatchesAndForward,
    config: PruningConfig,
    *,
    root: nn.Module | None,
    progress: Callable[[Sequence[str]], Iterable[str]],
    ranks: Ranks | None,
    recording: Recording | None = None,
) -> tuple[PruningPlan, dict[str, Tensor]]:
    """What :func:`repair` does, for callers that have to prepare something every time that batches are run: in ``data``."""
    if config.repair == "bias":
        return bias_fold(model, group_sets, plan, statistics)
    narrower = any(e.kind == HIDDEN for e in plan.entries)
    if config.repair != "least_squares":
        return plan, scaled_norms(model, plan) if narrower and config.rotate_hidden else {}
    all_reduce = None if ranks is None else ranks.sum
    if not config.repairs_on_all:
        data = partial(_not_held_back, data, config)
    if narrower or is_chain(model, group_sets):
        refit = (
            partial(refit_narrower, damping=DAMPING)
            if narrower
            else partial(least_squares, recording=recording, offload=config.offload_hidden_states)
        )
        try:
            with (
                _data(data, None if narrower else recording) as (batches, forward),
                together(ranks, "repair"),
                shared_work(ranks),
            ):
                return plan, refit(
                    model, group_sets, plan, batches, forward, root=root, progress=progress, all_reduce=all_reduce
                )
        except UnsupportedModelError as error:
            if narrower:
                warnings.warn(f"Nothing was repaired: {error}", stacklevel=3)
                return plan, {}
            log.info(
                "Layers are repaired in the order in which they run, in several passes over the batches: %s", error
            )
    try:
        with together(ranks, "repair"), shared_work(ranks):
            return plan, refit_in_order(
                model, group_sets, plan, data, root=root, progress=progress, all_reduce=all_reduce
            )
    except UnsupportedModelError as error:
        warnings.warn(f"Nothing was repaired: {error}", stacklevel=3)
    return plan, {}
