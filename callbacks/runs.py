"""State of runs: what was done to which model, for callbacks that are given several one after the other."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from torch import nn

from lit_prune.architectures.registry import find_group_sets, has_groups
from lit_prune.errors import PruningError
from lit_prune.io.lightning_checkpoint import plan_digest
from lit_prune.plan import PruningPlan
from lit_prune.ranking.model_table import model_size
from lit_prune.ranking.selection import Limits
from lit_prune.ranking.table import GroupTable

T = TypeVar("T")


class _ByModule(Generic[T]):
    """The module that a value is of, and the values of other modules, put aside; modules are held by weak references.

    Attributes:
        found: Whether a module was given, even if it is gone by now.
    """

    def __init__(self) -> None:
        self._module: weakref.ref[nn.Module] | None = None
        self._others: weakref.WeakKeyDictionary[nn.Module, T] = weakref.WeakKeyDictionary()

    @property
    def found(self) -> bool:
        return self._module is not None

    @property
    def module(self) -> nn.Module | None:
        return None if self._module is None else self._module()

    @module.setter
    def module(self, module: nn.Module | None) -> None:
        self._module = None if module is None else weakref.ref(module)

    def put_aside(self, value: T) -> None:
        """Keep the value of the module at hand, if it lives."""
        if (module := self.module) is not None:
            self._others[module] = value

    def take(self, module: nn.Module) -> T | None:
        """Return the value that was put aside for a module, once."""
        return self._others.pop(module, None)


class PerModule(Generic[T]):
    """The state of a callback, one for each module that it was given. Modules are held by weak references.

    Args:
        new: Makes the state of a module that is seen for the first time.

    Attributes:
        value: The state of the module given last.
    """

    def __init__(self, new: Callable[[], T]) -> None:
        self.value = new()
        self._new = new
        self._of: _ByModule[T] = _ByModule()

    def __getstate__(self) -> dict[str, Any]:
        """The present state; which object its module was means nothing in another process."""
        return {"value": self.value, "new": self._new}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the present state."""
        self.__init__(state["new"])  # type: ignore[misc]
        self.value = state["value"]

    def begin(self, module: nn.Module) -> None:
        """Make the state of a module the present one."""
        if self._of.module is module:
            return
        self._of.put_aside(self.value)
        if self._of.found:
            known = self._of.take(module)
            self.value = self._new() if known is None else known
        self._of.module = module

    def reset(self) -> None:
        """Begin anew with the same module."""
        self.value = self._new()


@dataclass(frozen=True)
class PruningRun:
    """State of one pruning run. Frozen, so that a single assignment goes from one state to the next.

    Args:
        start: Digest of the plan of the model that the run began with; ``None`` for a dense model.
        now: Digest of the plan of the model as it is.
        reference: Parameters and prunable parameters of the model that the run began with.
        plan: The plan from the model that the run began with to the model as it is.
        table: The group table of the last stage.
        stages_done: Number of stages of the schedule that are done.
        reached: Parameters that the stages done were to remove from the model that the run began with.
        metrics: Validation metrics, by ``"dense"`` and ``"pruned"``.
        unfinished: Whether something that belongs to the last stage and comes after its cut is still to be done.
        path: Qualified name of the model in the LightningModule, if its groups were found by running it.
    """

    start: str | None = None
    now: str | None = None
    reference: tuple[int, int] | None = None
    plan: PruningPlan | None = None
    table: GroupTable | None = None
    stages_done: int = 0
    reached: int = 0
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    unfinished: bool = False
    path: str | None = None

    def measured(self, stage: str, values: Mapping[str, float]) -> PruningRun:
        """The same run with other metrics for ``stage``; with none if ``values`` is empty."""
        others = {name: dict(known) for name, known in self.metrics.items() if name != stage}
        return replace(self, metrics={**others, stage: dict(values)} if values else others)

    def state_dict(self) -> dict[str, Any]:
        """The run as plain data, without its table."""
        return {
            "plan": None if self.plan is None else self.plan.to_dict(),
            "stages_done": self.stages_done,
            "unfinished": self.unfinished,
            "path": self.path,
            "reference": None if self.reference is None else list(self.reference),
            "digests": {
                "start": self.start,
                "now": self.now,
                "plan": None if self.plan is None else self.plan.digest(),
            },
            "metrics": {stage: dict(values) for stage, values in self.metrics.items()},
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> PruningRun:
        """The run that :meth:`state_dict` wrote."""
        return cls(
            start=state["digests"]["start"],
            now=state["digests"]["now"],
            reference=None if state["reference"] is None else tuple(state["reference"]),
            plan=None if state["plan"] is None else PruningPlan.from_dict(state["plan"]),
            stages_done=state["stages_done"],
            metrics={stage: dict(values) for stage, values in state["metrics"].items()},
            unfinished=state.get("unfinished", False),
            path=state.get("path"),
        )


class Runs:
    """The pruning runs of one callback, one for each model that it was given.

    A fit with a model that the callback has not seen begins a new run; a fit with one that it has pruned continues the run
    of that model; a checkpoint brings the run that it was written in. Models are held by weak references.

    Attributes:
        current: The run of the model given last.
    """

    def __init__(self) -> None:
        self.current = PruningRun()
        self._of: _ByModule[PruningRun] = _ByModule()
        self._made: set[str] = set()
        self._loaded = False

    def __getstate__(self) -> dict[str, Any]:
        """The current run; which object its model was means nothing in another process."""
        return {"current": self.current, "made": self._made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the current run."""
        self.__init__()  # type: ignore[misc]
        self.current, self._made = state["current"], set(state["made"])

    def begin(self, model: nn.Module | None) -> None:
        """Choose the run of a model, at the beginning of a fit.

        Args:
            model: The model; ``None`` if it does not exist yet (``configure_model``), or if this is no fit.
        """
        self._loaded = False
        if model is not None:
            self._choose(model)

    def load(self, run: PruningRun) -> None:
        """Take over the run of a checkpoint, in place of the one chosen; :meth:`bind` checks that it fits the model."""
        if run.now == self.current.now and run.stages_done == self.current.stages_done:
            run = replace(run, table=self.current.table)
        self._of.put_aside(self.current)
        self._of.module, self._loaded = None, True
        self.commit(run)

    def bind(self, model: nn.Module, limits: Limits) -> None:
        """Tie the current run to a model.

        Args:
            model: The model.
            limits: What may leave: whole blocks and hidden channels are groups only if they may.

        Raises:
            PruningError: If the model is not cut as the run says.
        """
        if not self._loaded:
            self._choose(model)
        found, known = plan_digest(model), self._of.found
        if self.current.reference is None and not known and found in self._made:
            raise PruningError(
                f"The model carries the plan {_short(found)}, which this StructuredPruning made in an earlier fit, but it is"
                " another object than the model pruned then (a copy, or one loaded from a file), so it is not clear"
                " whether to go on or to prune it further. To go on, give the module as it was when that run began and"
                " its checkpoint: trainer.fit(module, ckpt_path=...). To prune it further, use a new StructuredPruning."
            )
        if self.current.reference is None:
            # the groups of a model that no description covers are found later
            size = None
            if has_groups(model):
                size = model_size(model, find_group_sets(model, blocks=limits.blocks, hidden=limits.hidden))
            self.current = replace(self.current, start=found, now=found, reference=size)
        elif found != self.current.now:
            raise PruningError(
                f"The model is cut by {_short(found)}, but this StructuredPruning left it cut by"
                f" {_short(self.current.now)}. Was it pruned by something else in between, or are its weights of another"
                " checkpoint? Use a new StructuredPruning for it."
            )
        self._of.module = model

    def traced(self, path: str) -> None:
        """Note where the model is whose groups were found by running it."""
        self.current = replace(self.current, path=path)

    def commit(self, run: PruningRun) -> Callable[[], None]:
        """Make a run the current one, for the same model, and return a function that undoes this."""
        before, made = self.current, set(self._made)

        def undo() -> None:
            self.current, self._made = before, made

        if run.now != run.start and run.now is not None:
            self._made.add(run.now)
        self.current = run
        return undo

    def _choose(self, model: nn.Module) -> None:
        if self._of.module is model:
            return
        found = plan_digest(model)
        unbound = not self._of.found and self.current.reference is not None
        self._of.put_aside(self.current)
        if (known := self._of.take(model)) is not None:
            self.current, self._of.module = known, model
        elif not (unbound and found == self.current.now != self.current.start):
            self.current, self._of.module = PruningRun(start=found, now=found), None


def _short(digest: str | None) -> str:
    return "no plan (it is dense)" if digest is None else f"the plan {digest[:12]}"
