"""Measures what groups save: the model itself is cut, timed and put back, so that what is around a product counts, too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lit_prune.architectures import find_group_sets, find_model
from lit_prune.arguments import COUNT, choice, sequence_of
from lit_prune.budgets.budget import PHASES, PREFILL
from lit_prune.budgets.latency_table import (
    LatencyTable,
    Times,
    cache_file,
    load_tables,
    save_tables,
    setting_of,
)
from lit_prune.budgets.workloads import Workload
from lit_prune.distributed import shards
from lit_prune.errors import PruningError, UnsupportedStrategyError
from lit_prune.groups import BLOCK, GroupSet, stack_of
from lit_prune.plan import PruningPlan
from lit_prune.surgery.apply import cut
from lit_prune.surgery.kept_groups import with_kept_groups

Clock = Callable[[], float]

# seconds to spend on the repetitions, after the first two
_PATIENCE = 40.0
_FRACTIONS = (0.75, 0.5, 0.25)
# widths below half of a set's, to find the step of its times by
_STEPS = (8, 16, 32, 64)
# a set with fewer groups than this is measured at every number of them, and has no steps
_FEW = 8
# what a width may take more than a line through the multiples of 128, as a part of what the whole set takes
_EXCESS = 0.02


def measure_latency(
    module: nn.Module,
    phases: Sequence[str] = (PREFILL,),
    *,
    batch: int = 1,
    length: int = 512,
    blocks: bool = False,
    path: str | Path | None = None,
) -> list[LatencyTable]:
    """Measure times of a model on this machine, and write them to a file for ``Budget(latency_table=path)`` elsewhere.

    Args:
        module: A model that is called with token ids, or a module that holds one; the same after as before.
        phases: ``"prefill"``, ``"decode"``, ``"train"``.
        batch: Sequences.
        length: Tokens of each.
        blocks: Measure what whole blocks take, too.
        path: The file to write; none is written if ``None``.

    Returns:
        One table for each phase.

    Raises:
        BudgetError: If the model has no such phase.
    """
    sequence_of("a list of phases", choice(*PHASES), empty=False).check("phases", phases)
    model = find_model(module)[1]
    group_sets = find_group_sets(model, blocks=blocks)
    workload = Workload(model, COUNT.check("batch", batch), COUNT.check("length", length))
    tables = [measure_table(workload, group_sets, phase) for phase in phases]
    if path is not None:
        save_tables(path, tables)
    return tables


def latency_table(workload: Workload, group_sets: Sequence[GroupSet], phase: str) -> LatencyTable:
    """The table of a phase from the cache, or measured now and put there."""
    file = cache_file(setting_of(workload, group_sets, phase))
    with suppress(FileNotFoundError, PruningError):
        return load_tables(file)[0]
    table = measure_table(workload, group_sets, phase)
    # a cache that cannot be written is none
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tables(file, [table])
    return table


def measure_table(
    workload: Workload,
    group_sets: Sequence[GroupSet],
    phase: str,
    patience: float = _PATIENCE,
    clock: Clock = time.perf_counter,
) -> LatencyTable:
    """Measure what the sets of each kind and size save at several numbers of groups, all of them cut alike at a time.

    Args:
        workload: The model, the same after as before.
        group_sets: Its group sets.
        phase: The phase.
        patience: Seconds after which no further round of all the cuts begins; there are two at least.
        clock: As for :func:`time_plans`.

    Raises:
        UnsupportedStrategyError: If the model is sharded.
    """
    model = workload.model
    if shards.any_sharded(model.parameters()) is not None:
        raise UnsupportedStrategyError(
            "Times cannot be measured of a model that is sharded. Measure them before, with lit_prune.measure_latency, and"
            " give the file as budget.latency_table."
        )
    variants = list(_variants(group_sets))
    plans: dict[object, PruningPlan | None] = {None: None}
    plans |= {(v.kind, v.size, v.kept): v.plan(model, group_sets) for v in variants}
    seconds = time_plans(workload, phase, plans, patience, clock=clock)
    dense = min(seconds[None])
    noise = _spread(seconds[None]) / dense
    times = []
    for kind, size in dict.fromkeys((v.kind, v.size) for v in variants):
        sets = [s.name for s in group_sets if s.kind == kind and (kind == BLOCK or s.size == size)]
        mine = [v for v in variants if (v.kind, v.size) == (kind, size)]
        saved = {v.kept: (dense - min(seconds[kind, size, v.kept])) / v.cuts for v in mine}
        main = sorted(v.kept for v in mine if not v.probe)
        line = np.maximum.accumulate([0.0, *(saved[k] for k in reversed(main))])[::-1]
        curve = Times(kind, size, tuple(sets), (*main, size), tuple(float(x) for x in line))
        step = _step(curve, {v.kept: saved[v.kept] for v in mine if v.probe}, noise * dense / len(sets))
        times.append(Times(kind, size, curve.sets, curve.kept, curve.saved, step))
    return LatencyTable(setting_of(workload, group_sets, phase), dense, tuple(times))


def time_plans(
    workload: Workload,
    phase: str,
    plans: Mapping[object, PruningPlan | None],
    patience: float = _PATIENCE,
    rounds: int = 12,
    clock: Clock = time.perf_counter,
) -> dict[object, list[float]]:
    """Seconds of a phase with each of several cuts, which take turns so that all meet the same disturbances.

    Args:
        workload: The model, the same after as before.
        phase: The phase.
        plans: The cuts by any key; ``None`` for the model as it is.
        patience: Seconds after which no further round begins; there are two at least.
        rounds: Most rounds.
        clock: ``time.process_time`` for CPU time, on a machine that others use; with one thread only.

    Returns:
        By key one number for every round.
    """
    seconds: dict[object, list[float]] = {key: [] for key in plans}
    begun = time.perf_counter()
    for number in range(rounds):
        if number > 1 and (time.perf_counter() - begun) * (number + 1) / number > patience:
            break
        for key, plan in plans.items():
            with _cut(workload.model, plan), workload.step(phase) as step:
                seconds[key].append(_time(step, next(workload.model.parameters()).device, clock))
    return seconds


@contextmanager
def _cut(model: nn.Module, plan: PruningPlan | None) -> Iterator[None]:
    undo: Callable[[], None] = cut(model, plan) if plan is not None else lambda: None
    try:
        yield
    finally:
        undo()


def _time(step: Callable[[], None], device: torch.device, clock: Clock) -> float:
    """Seconds of one step: the least of several after one that warms up, of one only if it is long."""
    best, spent = np.inf, 0.0
    for number in range(30):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = clock()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = clock() - start
        if number:
            best, spent = min(best, took), spent + took
        if (number > 2 and spent > 0.1) or spent > 0.5:
            break
    return float(best)


@dataclass(frozen=True)
class _Variant:
    """All sets of one kind and size cut to the same number of groups; blocks: so many of them removed."""

    kind: str
    size: int
    kept: int
    probe: bool
    # what the time saved is divided by
    cuts: int

    def plan(self, model: nn.Module, group_sets: Sequence[GroupSet]) -> PruningPlan:
        blocks = [s.name for s in group_sets if s.kind == BLOCK]
        gone = set(blocks[1::2][: self.cuts]) if self.kind == BLOCK else set()
        kept = []
        for group_set in group_sets:
            groups = np.arange(group_set.size)
            if group_set.kind == BLOCK:
                groups = groups[:0] if group_set.name in gone else groups
            elif (group_set.kind, group_set.size) == (self.kind, self.size):
                parts = group_set.equal_parts
                groups = groups.reshape(parts, -1)[:, : self.kept // parts].flatten()
            kept.append(groups)
        return with_kept_groups(model, PruningPlan.from_kept(group_sets, kept))


def _variants(group_sets: Sequence[GroupSet]) -> Iterator[_Variant]:
    stacks: dict[str, int] = {}
    for group_set in group_sets:
        if group_set.kind == BLOCK:
            stack = stack_of(group_set.name)[0]
            stacks[stack] = stacks.get(stack, 0) + 1
    blocks = sum(stacks.values())
    if blocks > 1:
        yield _Variant(BLOCK, 1, 0, False, blocks // 2)
    families: dict[tuple[str, int], list[GroupSet]] = {}
    for group_set in group_sets:
        if group_set.kind != BLOCK:
            families.setdefault((group_set.kind, group_set.size), []).append(group_set)
    for (kind, size), members in families.items():
        unit = int(np.lcm.reduce([np.lcm(s.equal_parts, s.multiple_of) for s in members]))
        least = max(unit, max(s.minimum for s in members))
        if size <= _FEW:
            points = set(range(least, size, unit))
        else:
            align = max((a for a in (128, 64, 32, 16, 8) if size >= 8 * a), default=1)
            points = {max(round(size * f / align), 1) * align // unit * unit for f in _FRACTIONS}
        points = {p for p in points if least <= p < size}
        for kept in sorted(points):
            yield _Variant(kind, size, kept, False, len(members))
        if size >= 1024 and unit == 1:
            half = round(size / 2 / 128) * 128
            for step in _STEPS:
                yield _Variant(kind, size, half - step, True, len(members))


def _step(curve: Times, probes: Mapping[int, float], noise: float) -> int:
    """The smallest step from which on widths take no more than a line through the multiples of 128 says, beyond noise."""
    if not probes:
        return 1
    allowed = max(_EXCESS * float(curve.at(np.array([0]))[0]), 2 * noise)
    half = round(curve.size / 2 / 128) * 128
    good = 128
    for step in reversed(_STEPS):
        excess = float(curve.at(np.array([half - step]))[0]) - probes[half - step]
        if excess > allowed:
            break
        good = step
    return good


def _spread(values: Sequence[float]) -> float:
    """How far the two shortest times are apart."""
    low = sorted(values)[:2]
    return low[-1] - low[0]
