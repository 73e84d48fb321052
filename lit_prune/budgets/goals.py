"""A budget against one model, from the model as it was given to the one that is left after several cuts."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from lit_prune.budgets.budget import FLOPS, LATENCY, MEMORY, PARAMS, Budget
from lit_prune.budgets.flops import count_flops, flops_model
from lit_prune.budgets.latency import Clock, latency_table, time_plans
from lit_prune.budgets.latency_model import LatencyModel
from lit_prune.budgets.latency_table import find_table, setting_of
from lit_prune.budgets.memory import count_memory, memory_model
from lit_prune.budgets.resources import Quantity, Resource
from lit_prune.budgets.sizes import SizeModel, SizeSum
from lit_prune.budgets.trials import time_trial
from lit_prune.budgets.workloads import Example, Workload
from lit_prune.groups import GroupSet, count_parameters
from lit_prune.plan import PruningPlan, get_plan

# seconds of trial cuts, and of measuring the model that is left
_CORRECTION_SECONDS, _MEASURING_SECONDS = 120.0, 20.0
# the most that predicted savings are multiplied or divided by
_MOST = 2.0


class Goals:
    """The limits of a budget for one model, and what it and every smaller one take.

    Args:
        model: The model, as it is before any cut. It is run, and the same afterwards.
        group_sets: Its group sets.
        budget: The budget.
        example: Runs a calibration batch where the model takes no token ids, see :class:`Workload`.
        biases: Elements of the biases that a repair may add, by layer: predicted parameters and memory of a cut model hold
            all of them.

    Attributes:
        dense: What the model takes, by name of the limit.
        targets: The limits, in the base unit.

    Raises:
        BudgetError: If the budget asks for something that the model does not have.
        ArgumentValueError: If the latency table is of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        group_sets: Sequence[GroupSet],
        budget: Budget,
        example: Example | None = None,
        biases: Mapping[str, int] | None = None,
    ) -> None:
        self.budget, self._example = budget, example
        self._keys = {_original(model, s).key: i for i, s in enumerate(group_sets)}
        self._sizes = np.array([s.size for s in group_sets], dtype=np.int64)
        self._groups = list(group_sets)
        self.quantities: dict[str, Quantity] = {}
        flops: SizeSum | None = None
        for name in budget.limits:
            kind, _, phase = name.partition(".")
            if kind in (FLOPS, LATENCY) and flops is None:
                flops = flops_model(self._workload(model), group_sets)
            if kind == PARAMS:
                sizes = SizeModel(model, group_sets)
                whole = np.ones(len(sizes.names), dtype=np.int64)
                self.quantities[name] = SizeSum(sizes, whole, np.zeros(len(group_sets), dtype=np.int64))
            elif kind == MEMORY:
                self.quantities[name] = memory_model(self._holder(model), group_sets, budget.served_as)
            elif kind == FLOPS:
                assert flops is not None
                self.quantities[name] = flops
            else:
                assert flops is not None
                self.quantities[name] = LatencyModel(self._table(model, phase), group_sets, flops)
        self.dense = {name: float(q.value(self._sizes)) for name, q in self.quantities.items()}
        self.targets = {name: limit.of(self.dense[name]) for name, limit in budget.limits.items()}
        self._added = _added(model, biases or {}, budget)

    def _workload(self, model: nn.Module) -> Workload:
        return Workload(model, self.budget.batch, self.budget.length, self._example)

    def _holder(self, model: nn.Module) -> Workload:
        """A workload for memory, which takes no example: a model without token ids has no cache."""
        return Workload(model, self.budget.batch, self.budget.length, self._example or _no_example)

    def _table(self, model: nn.Module, phase: str) -> Any:
        workload = self._workload(model)
        if self.budget.latency_table is not None:
            return find_table(str(self.budget.latency_table), setting_of(workload, self._groups, phase))
        return latency_table(workload, self._groups, phase)

    @property
    def measures_here(self) -> bool:
        """Whether the budget limits times of this machine."""
        return bool(self.budget.phases) and self.budget.latency_table is None

    def resources(self, model: nn.Module, group_sets: Sequence[GroupSet], share: float = 1.0) -> list[Resource]:
        """The limits for what is left of the model.

        Args:
            model: The model, after the cuts so far.
            group_sets: Its group sets now.
            share: How far to go from the model as it was given to the limits: a half is half of what has to be saved.
        """
        place = self._place(model, group_sets)
        found = []
        for name, quantity in self.quantities.items():
            target = self.dense[name] - (self.dense[name] - self.targets[name]) * share
            found.append(
                Resource(name, _Remaining(quantity, place, len(self._sizes), self._added.get(name, 0)), target)
            )
        return found

    def multiples(self, model: nn.Module, group_sets: Sequence[GroupSet]) -> np.ndarray | None:
        """The steps of the measured times of every set, if there are any, int array of shape ``(sets,)``."""
        models = [q for q in self.quantities.values() if isinstance(q, LatencyModel)]
        if not models:
            return None
        steps = np.maximum.reduce([m.multiple for m in models])[self._place(model, group_sets)]
        return np.lcm(steps, np.array([s.multiple_of for s in group_sets], dtype=np.int64))

    def _place(self, model: nn.Module, group_sets: Sequence[GroupSet]) -> np.ndarray:
        return np.array([self._keys[_original(model, s).key] for s in group_sets], dtype=np.int64)

    def correct(
        self,
        model: nn.Module,
        propose: Callable[[], tuple[PruningPlan, Mapping[str, float]]],
        patience: float = _CORRECTION_SECONDS,
        clock: Clock = time.perf_counter,
    ) -> None:
        """Correct predicted times by cuts like the one asked for, which are timed in turn with the model and undone.

        A prediction is corrected only as far as it lies outside of the 95% interval of the trial, and predicted savings by
        a factor of 2 at most, all trials together. Trials go on, each with the plan of the corrected prediction, until one
        confirms it, the time is over, or times spread so far that further ones would follow the noise.

        Args:
            model: The model as it was given.
            propose: Makes a plan that reaches the limits, with what it is predicted to take.
            patience: Seconds after which no further trial begins, for all limits together.
            clock: As for :func:`lit_prune.budgets.latency.time_plans`.

        Warns:
            UserWarning: If times spread so far that they say little, or savings are predicted more than 2 times wrong.
        """
        workload = self._workload(model)
        until = time.perf_counter() + patience
        latencies = {name: q for name, q in self.quantities.items() if isinstance(q, LatencyModel)}
        confirmed, doubts = False, dict[str, str]()
        while not confirmed and not doubts:
            plan, predicted = propose()
            confirmed = True
            for name, quantity in latencies.items():
                expected = predicted[name] / self.dense[name]
                if expected >= 1:
                    continue
                ratio = time_trial(workload, name.partition(".")[2], plan, until, clock)
                wanted = quantity.correction * (1 - ratio.nearest(expected)) / (1 - expected)
                correction = min(max(wanted, 1 / _MOST), _MOST)
                if not ratio.narrow or correction != wanted:
                    doubts[name] = f"{expected:.3g} times that of the dense model; timed were {ratio}"
                confirmed &= correction == quantity.correction
                quantity.correction = correction
            if time.perf_counter() >= until:
                break
        for name, doubt in doubts.items():
            warnings.warn(
                f"Trial cuts do not confirm what is predicted of {name}, which is {doubt}. Predicted savings are corrected by a"
                f" factor of {latencies[name].correction:.2f}, and the budget may be missed. Prune while the machine does nothing"
                " else, or give a latency_table that was measured then.",
                stacklevel=2,
            )

    def measure(self, model: nn.Module) -> dict[str, float]:
        """What the model takes now, measured, by name of the limit; times if they are of this machine."""
        found: dict[str, float] = {}
        for name in self.quantities:
            kind, _, phase = name.partition(".")
            if kind == PARAMS:
                found[name] = count_parameters(model)
            elif kind == FLOPS:
                found[name] = count_flops(self._workload(model))
            elif kind == MEMORY:
                found[name] = count_memory(self._holder(model), self.budget.served_as)
            elif self.measures_here:
                found[name] = min(time_plans(self._workload(model), phase, {"": None}, _MEASURING_SECONDS)[""])
        return found

    def rows(self, predicted: Mapping[str, float], measured: Mapping[str, float]) -> list[dict[str, Any]]:
        """What was asked, predicted and measured of each limit, as plain data."""
        return [
            {
                "name": name,
                "asked": str(asked),
                "dense": self.dense[name],
                "target": self.targets[name],
                "predicted": float(predicted[name]),
                **({"measured": float(measured[name])} if name in measured else {}),
            }
            for name, asked in self.budget.asked.items()
        ]


def _no_example() -> contextlib.AbstractContextManager[Callable[[], None]]:
    return contextlib.nullcontext(lambda: None)


def _original(model: nn.Module, group_set: GroupSet) -> GroupSet:
    plan = get_plan(model)
    return group_set if plan is None else plan.original(group_set)


def _added(model: nn.Module, biases: Mapping[str, int], budget: Budget) -> dict[str, int]:
    """What biases of so many elements add to parameters and bytes."""
    dtypes = {name: budget.served_as or model.get_parameter(f"{name}.weight").dtype for name in biases}
    return {
        PARAMS: sum(biases.values()),
        MEMORY: sum(number * dtypes[name].itemsize for name, number in biases.items()),
    }


@dataclass(eq=False)
class _Remaining:
    """A quantity of the model as it was given, in terms of the sets that are left, and what a repair adds to it."""

    quantity: Quantity
    place: np.ndarray
    sets: int
    added: int

    def value(self, kept: np.ndarray) -> float:
        return self.quantity.value(self._all(kept)) + self.added

    def saved(self, kept: np.ndarray) -> np.ndarray:
        return self.quantity.saved(self._all(kept))[self.place]

    def _all(self, kept: np.ndarray) -> np.ndarray:
        # sets that are not found any more have lost all of their groups
        whole = np.zeros(self.sets, dtype=np.int64)
        whole[self.place] = kept
        return whole
