"""The phases of pruning by name, and what each is expected to take."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lit_prune.calibration.statistic_registry import GroupStatistic, InputStatistic, get_statistic
from lit_prune.config import HELD_BACK, PruningConfig
from lit_prune.groups import BLOCK, GroupSet
from lit_prune.progress import Work
from lit_prune.repair.batch_norm import batch_norms
from lit_prune.repair.replay import is_chain

CHECK, CALIBRATION, COMPENSATION, COMPARISON, REPAIR = "check", "calibration", "compensation", "comparison", "repair"
RECALIBRATION, ROTATION, POLISH = "recalibration", "rotation", "polish"


# what no batches are run for
PLANNING, SURGERY = "planning", "surgery"

# forward passes that a forward and a backward pass take
_WITH_GRADIENTS = 3
# forward passes that a walk through the layers takes: to measure what they could make up for, and to refit them
_MEASURING, _REFITTING = 1, 3


def expected_work(
    model: nn.Module, group_sets: Sequence[GroupSet], config: PruningConfig, batches: int, *, dry_run: bool = False
) -> list[Work]:
    """What :func:`lit_prune.prune` is expected to do in each of its phases, in order: an estimate for a progress bar.

    Args:
        model: The model.
        group_sets: Its group sets.
        config: The configuration.
        batches: Number of calibration batches.
        dry_run: Whether nothing is cut, so that there is one iteration.
    """
    one = expected_statistics(model, group_sets, config, batches)
    if config.rotate_hidden:
        one.insert(0, Work(ROTATION, batches, batches))
    if (candidates := len(config.candidates)) > 1:
        one.append(Work(PLANNING, candidates * batches / HELD_BACK, candidates * batches))
    if not dry_run:
        if config.repair == "least_squares":
            one.append(_walk(REPAIR, model, group_sets, batches, _REFITTING))
        if config.recalibrate_batch_norm and batch_norms(model):
            one.append(Work(RECALIBRATION, batches, batches))
    whole = [Work(CHECK, 1, 1), *one * (1 if dry_run else len(config.steps(model, group_sets)))]
    if config.polish_epochs and not dry_run:
        epochs = config.polish_epochs
        whole.insert(1, Work(POLISH, batches, batches))
        whole.append(Work(POLISH, batches * (1 + epochs * _WITH_GRADIENTS), batches * (1 + 2 * epochs)))
    return whole


def expected_statistics(
    model: nn.Module, group_sets: Sequence[GroupSet], config: PruningConfig, batches: int
) -> list[Work]:
    """The phases of :func:`expected_work` that collect the statistics of one iteration."""
    work = [Work(CALIBRATION, batches * (_WITH_GRADIENTS if _needs_gradients(config) else 1), batches)]
    if config.compensates:
        work.append(_walk(COMPENSATION, model, group_sets, batches, _MEASURING))
    return work


def _needs_gradients(config: PruningConfig) -> bool:
    statistics = [get_statistic(term.statistic) for term in config.terms if term.statistic is not None]
    return any(s.gradients if isinstance(s, GroupStatistic) else not isinstance(s, InputStatistic) for s in statistics)


def _walk(phase: str, model: nn.Module, group_sets: Sequence[GroupSet], batches: int, passes: int) -> Work:
    scored = [s for s in group_sets if s.kind != BLOCK]
    if is_chain(model, scored):
        # calibration recorded what the layers read
        return Work(phase, walk=passes * batches)
    # a pass for what is measured in all layers at once, and one for each layer that is refitted
    layers = len({part.module for s in scored for part in s.repairable})
    return Work(phase, batches, batches, 0 if passes == _MEASURING else layers * batches)
