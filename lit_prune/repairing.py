"""From a plan to a repaired model: which repair a model gets, and what it could make up for."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from lit_prune.calibration.statistics import Statistics
from lit_prune.config import PruningConfig
from lit_prune.distributed.ranks import Ranks, together
from lit_prune.errors import UnsupportedModelError
from lit_prune.groups import BLOCK, HIDDEN, GroupSet
from lit_prune.plan import PruningPlan
from lit_prune.repair.bias import bias_fold
from lit_prune.repair.channel_redundancy import unexplained_anywhere
from lit_prune.repair.module_order import refit_in_order
from lit_prune.repair.redundancy import unexplained_shares
from lit_prune.repair.refit import DAMPING, least_squares
from lit_prune.repair.replay import is_chain
from lit_prune.repair.stream import refit_narrower, scaled_norms

log = logging.getLogger(__name__)

BatchesAndForward = Callable[
    [], contextlib.AbstractContextManager[tuple[Iterable[Any], Callable[[Any], Tensor | None]]]
]


def unexplained(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    data: BatchesAndForward,
    root: nn.Module | None,
    progress: Callable[[Sequence[str]], Iterable[str]],
    ranks: Ranks | None,
) -> dict[tuple[str, str], Tensor]:
    """Measure what a repair by least squares could not make up for, by group set: the shares of :func:`unexplained_shares`.

    Args:
        model: The dense model.
        group_sets: Its group sets.
        data: Gives a context with the batches and a function that runs one.
        root: The module that holds the model; ``model`` if ``None``.
        progress: Wraps the sequence of blocks.
        ranks: The processes of a distributed run, each with batches of its own.

    Returns:
        A share for each group, by the key of its set; nothing for a model that cannot be measured so.
    """
    all_reduce = None if ranks is None else ranks.sum
    what = "measuring unexplained shares"
    group_sets = [s for s in group_sets if s.kind != HIDDEN]
    scored = [s for s in group_sets if s.kind != BLOCK]
    if is_chain(model, scored):
        try:
            with data() as (batches, forward), together(ranks, what):
                return unexplained_shares(
                    model, group_sets, batches, forward, root=root, progress=progress, all_reduce=all_reduce
                )
        except UnsupportedModelError:
            pass
    try:
        with together(ranks, what):
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
) -> tuple[PruningPlan, dict[str, Tensor]]:
    """What :func:`repair` does, for callers that have to prepare something every time that batches are run: in ``data``."""
    if config.repair == "bias":
        return bias_fold(model, group_sets, plan, statistics)
    narrower = any(e.kind == HIDDEN for e in plan.entries)
    if config.repair != "least_squares":
        return plan, scaled_norms(model, plan) if narrower and config.rotate_hidden else {}
    all_reduce = None if ranks is None else ranks.sum
    if narrower or is_chain(model, group_sets):
        refit = partial(refit_narrower, damping=DAMPING) if narrower else least_squares
        try:
            with data() as (batches, forward), together(ranks, "repair"):
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
        with together(ranks, "repair"):
            return plan, refit_in_order(
                model, group_sets, plan, data, root=root, progress=progress, all_reduce=all_reduce
            )
    except UnsupportedModelError as error:
        warnings.warn(f"Nothing was repaired: {error}", stacklevel=3)
    return plan, {}
