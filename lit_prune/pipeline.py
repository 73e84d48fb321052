"""From statistics to a plan in one call: what the callback, the command line and a notebook share."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_prune import sharding
from lit_prune.architectures import find_group_sets, find_model
from lit_prune.blocks import passed_over
from lit_prune.distributed import Ranks
from lit_prune.errors import CalibrationError, SmallBudgetError, UnsupportedModelError, UnsupportedStrategyError
from lit_prune.groups import GroupSet, check_names, count_parameters, count_removed
from lit_prune.importance import Term, check_normalization, get_criterion, group_importance, mixed_importance
from lit_prune.plan import PruningPlan
from lit_prune.repair import REPAIRS, bias_fold, least_squares, unexplained_shares
from lit_prune.selection import Limits, check_ratio, parameter_budget, select
from lit_prune.statistics import (
    Statistics,
    check_gathering,
    check_repeatable,
    collect_statistics,
    evaluation_mode,
)
from lit_prune.surgery import cut, get_plan
from lit_prune.table import GroupTable

DEFAULT = "default"
AUTO = "auto"

# what importance="auto" chooses from; plain taylor is among them, so that it cannot lose to it but by noise
CANDIDATES: dict[str, dict[str, float]] = {
    "taylor": {"taylor": 1.0},
    "second_order": {"second_order": 1.0},
    "fisher": {"fisher": 1.0},
    "taylor_batch + output_wanda": {"taylor_batch": 0.75, "output_wanda": 0.25},
}
HELD_BACK = 8
_ROUNDS = 20


@dataclass(frozen=True)
class PruningConfig:
    """How to prune.

    Args:
        importance: Name of a criterion; a mix of several, ``{name: weight}``, each scaled to sum to 1 over the model; or
            ``"auto"``, which ranks by each of :data:`CANDIDATES` from one calibration, holds every eighth calibration
            batch back, and takes the plan whose masked model has the lowest loss on those.
        pruning_ratio: Fraction of parameters to remove, strictly between 0 and 1.
        ratio_of: Of ``"all"`` parameters of the model, or of the ``"prunable"`` ones.
        normalize: Normalisation of the importance; ``"default"`` is the criterion's own, ``None`` is none.
        statistics: How gradients are kept, ``"streaming"`` or ``"elementwise"``.
        gradient_dtype: What gradients are accumulated in where a criterion needs them element by element (``taylor``):
            ``"float32"`` or ``"bfloat16"``.
        offload_gradients: Accumulate those in CPU memory in place of the model's device.
        limits: Floors, protections and rounding.
        repair: How the consumers of what leaves make up for it: ``"least_squares"``, ``"bias"`` or ``None``; see
            :mod:`lit_prune.repair`.
        seed: Seed of the criterion ``random``.
        compensation: Whether importance takes into account what ``"least_squares"`` will make up for: it is multiplied by the
            square root of the share of a group's contribution that the other groups at the same place cannot explain. Two
            more forward passes over the calibration batches in each iteration.
        iterations: Reach the ratio in so many equal cuts, each of which calibrates, ranks and repairs anew on what the one before
            left; see :func:`prune`.
        reference: Parameters and prunable parameters of the model that the ratio is of, if that is not the model as given
            (the later stages of a schedule): what is gone already counts towards the ratio.
    """

    importance: str | Mapping[str, float] = "fisher"
    pruning_ratio: float = 0.2
    ratio_of: str = "all"
    normalize: str | None = DEFAULT
    statistics: str = "streaming"
    gradient_dtype: str = "float32"
    offload_gradients: bool = False
    limits: Limits = field(default_factory=Limits)
    repair: str | None = "least_squares"
    seed: int = 0
    compensation: bool = True
    iterations: int = 2
    reference: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check everything that can be checked without a model.

        Raises:
            ValueError: If a value is unknown or out of its range.
        """
        for weights in self.candidates.values():
            if not weights or not all(weight > 0 for weight in weights.values()):
                raise ValueError(f"A mix of criteria needs positive weights by name; found {dict(weights)}.")
            for name in weights:
                get_criterion(name)
        check_ratio(self.pruning_ratio, self.ratio_of)
        if self.normalize != DEFAULT:
            check_normalization(self.normalize)
        if self.repair is not None and self.repair not in REPAIRS:
            raise ValueError(f"Unknown repair {self.repair!r}; expected None or one of {', '.join(REPAIRS)}.")
        check_gathering(self.statistics, self.gradient_dtype)
        if self.iterations < 1:
            raise ValueError(f"iterations must be 1 or more; found {self.iterations}.")

    @property
    def candidates(self) -> dict[str, Mapping[str, float]]:
        """The mixes of criteria to choose from, by what they are called; one, unless ``importance`` is ``"auto"``."""
        if self.importance == AUTO:
            return dict(CANDIDATES)
        if isinstance(self.importance, str):
            return {self.importance: {self.importance: 1.0}}
        return {" + ".join(self.importance): self.importance}

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms that calibration has to collect for."""
        return tuple(
            term for weights in self.candidates.values() for name in weights for term in get_criterion(name).terms
        )

    @property
    def compensates(self) -> bool:
        """Whether importance is to be discounted; that of the baselines, which look at no data, never is."""
        looks = any(term.statistic is not None for term in self.terms)
        return self.compensation and self.repair == "least_squares" and looks

    def holds_back(self, batch: int) -> bool:
        """Whether a calibration batch is kept out of the statistics, to choose between candidates by."""
        return self.importance == AUTO and batch % HELD_BACK == HELD_BACK - 1

    def check(self, model: nn.Module, group_sets: Sequence[GroupSet]) -> None:
        """Check against a model that the ratio can be reached, before any calibration.

        Raises:
            BudgetError: If it cannot.
            ValueError: If the limits name something the model does not have.
        """
        table = _table(model, group_sets, [torch.zeros(s.size) for s in group_sets])
        select(table, self.budget(model, group_sets), self.limits, _original_sizes(model))

    def steps(self, model: nn.Module, group_sets: Sequence[GroupSet]) -> list[PruningConfig]:
        """One configuration for every iteration, with ratios that rise evenly from what is gone already."""
        size = model_size(model, group_sets)
        reference = self.reference or size
        gone = (reference[0] - size[0]) / reference[0 if self.ratio_of == "all" else 1]
        shares = [(k + 1) / self.iterations for k in range(self.iterations - 1)]
        ratios = [gone + (self.pruning_ratio - gone) * share for share in shares]
        return [
            replace(self, pruning_ratio=r, reference=reference, iterations=1) for r in (*ratios, self.pruning_ratio)
        ]

    def budget(self, model: nn.Module, group_sets: Sequence[GroupSet]) -> int:
        """Parameters to remove from the model.

        The ratio is of the model as it is, or, with ``reference``, of what it was, less what is gone already.
        """
        total, prunable = model_size(model, group_sets)
        reference = self.reference or (total, prunable)
        return parameter_budget(self.pruning_ratio, self.ratio_of, *reference) - (reference[0] - total)


def model_size(model: nn.Module, group_sets: Sequence[GroupSet]) -> tuple[int, int]:
    """Parameters of the model, and how many of them belong to groups."""
    return count_parameters(model), count_removed(model, group_sets, [torch.arange(s.size) for s in group_sets])


def _select(model: nn.Module, group_sets: Sequence[GroupSet], table: GroupTable, config: PruningConfig) -> int:
    """Mark in the table which groups stay, and give the number of parameters that leave.

    Groups of different sets may share weights (a channel of all experts and a whole expert), which leave once but are in
    the cost of both: as many groups more leave as that leaves short of the budget.
    """
    budget = config.budget(model, group_sets)
    asked, best, chosen = budget, -1, table.kept
    for _ in range(_ROUNDS):
        table.kept = select(table, asked, config.limits, _original_sizes(model))
        removed, nominal = count_removed(model, group_sets, table.removed_groups()), table.removed_cost
        if best < removed <= budget:
            best, chosen = removed, table.kept
        if nominal == removed or 0 <= budget - removed < table.cost.min():
            break
        asked = nominal + budget - removed
    table.kept = chosen
    return best


def _table(model: nn.Module, group_sets: Sequence[GroupSet], importance: Sequence[Tensor]) -> GroupTable:
    """The group table, by the names and layers that everything had before blocks left in earlier cuts."""
    plan = get_plan(model)
    return GroupTable.build(group_sets if plan is None else [plan.original(s) for s in group_sets], importance)


def _original_sizes(model: nn.Module) -> dict[tuple[str, str], int]:
    plan = get_plan(model)
    return {} if plan is None else {e.key: e.size for e in plan.entries}


def calibrate(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    batches: Iterable[Any],
    loss_fn: Callable[[Any], Tensor | None],
    config: PruningConfig,
    *,
    root: nn.Module | None = None,
    ranks: Ranks | None = None,
) -> Statistics:
    """Collect what the configured criterion needs; see :func:`lit_prune.statistics.collect_statistics`."""
    return collect_statistics(
        model,
        group_sets,
        (batch for number, batch in enumerate(batches) if not config.holds_back(number)),
        loss_fn,
        config.terms,
        mode=config.statistics,
        activations=config.repair == "bias",
        gradient_dtype=config.gradient_dtype,
        offload_gradients=config.offload_gradients,
        root=root,
        ranks=ranks,
    )


def make_plan(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    statistics: Statistics | None,
    config: PruningConfig,
    *,
    measure: Callable[[PruningPlan], float] | None = None,
) -> tuple[GroupTable, PruningPlan]:
    """Score, rank and select: the global table with the rows that stay, and the plan that says the same.

    Args:
        model: The model.
        group_sets: Its group sets.
        statistics: What :func:`calibrate` collected; may be ``None`` for a criterion that needs nothing.
        config: The configuration.
        measure: What a plan costs, its masked loss for instance (:func:`masked_loss`); asked only where there are
            several candidates.

    Raises:
        BudgetError: If the ratio cannot be reached under the limits.
        CalibrationError: If an importance is not finite.
        UnsupportedModelError: If the group sets are of another model.
        ValueError: If there are several candidates and no ``measure``.
    """
    sharding.reshard(model)
    check_names(model, group_sets)
    parameters: Mapping[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    before = count_parameters(model)
    results: list[tuple[GroupTable, PruningPlan]] = []
    measured: dict[str, float] = {}
    if len(config.candidates) > 1 and measure is None:
        raise ValueError(
            f"importance={config.importance!r} chooses between plans and needs a measure of them; found None."
        )
    for label, weights in config.candidates.items():
        parts = []
        for name, weight in weights.items():
            criterion = get_criterion(name)
            normalize = criterion.normalize if config.normalize == DEFAULT else config.normalize
            importance = group_importance(
                criterion, parameters, group_sets, statistics, normalize=normalize, seed=config.seed
            )
            parts.append((weight, importance))
        total = parts[0][1] if len(parts) == 1 else mixed_importance(parts, group_sets)
        if statistics is not None and statistics.unexplained:
            total = _discounted(total, group_sets, statistics.unexplained)
        table = _table(model, group_sets, total)
        removed = _select(model, group_sets, table, config)
        info = {
            "importance": label,
            "weights": dict(weights),
            "normalize": config.normalize,
            "repair": config.repair,
            "pruning_ratio": config.pruning_ratio,
            "ratio_of": config.ratio_of,
            "calibration_batches": statistics.batches if statistics is not None else 0,
            "parameters_before": before,
            "parameters_after": before - removed,
        }
        plan = PruningPlan.from_kept(group_sets, table.kept_groups(), info)
        results.append((table, plan))
        if measure is not None and len(config.candidates) > 1:
            measured[label] = measure(plan)
    if not measured:
        return results[0]
    best = min(measured, key=measured.__getitem__)
    table, plan = results[list(measured).index(best)]
    return table, replace(plan, info={**plan.info, "candidates": measured})


def _discounted(
    importance: Sequence[Tensor], group_sets: Sequence[GroupSet], unexplained: Mapping[tuple[str, str], Tensor]
) -> list[Tensor]:
    """Importance times the square root of the shares, which measured better than the shares themselves."""
    return [
        i * unexplained[s.key].sqrt().to(i) if s.key in unexplained else i
        for i, s in zip(importance, group_sets, strict=True)
    ]


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[Any], Tensor | None],
    config: PruningConfig,
    optimizers: Iterable[Optimizer] = (),
) -> tuple[GroupTable, PruningPlan]:
    """Calibrate, plan, repair and cut, as often as ``config.iterations`` says: the whole way in one call.

    Cutting little by little is better than all at once on the same calibration batches: what is important, and what can
    make up for it, is measured again once the rest is gone. An error leaves model and optimizers as they were.

    Args:
        model: The model, or a module that holds one; cut in place.
        batches: Calibration batches; iterated several times, so not an iterator.
        loss_fn: Runs one batch through the model and returns its loss.
        config: The configuration.
        optimizers: Optimizers over the model's parameters, cut along.

    Returns:
        The group table of the model as it was, and the plan for it. A group's importance is that of the last iteration that
        ranked it.

    Raises:
        BudgetError: If the ratio cannot be reached under the limits, before any work is done.
        CalibrationError: If calibration met a loss or gradient that is not finite, or no data.
        TypeError: If the batches are an iterator.

    Example::

        table, plan = lit_prune.prune(model, batches, lambda b: model(**b).loss, PruningConfig(pruning_ratio=0.2))
    """
    check_repeatable(batches, "batches")
    inner = find_model(model)[1]
    return prune_with(inner, lambda _: contextlib.nullcontext((batches, loss_fn)), config, optimizers, root=model)


CALIBRATION, COMPENSATION, COMPARISON, REPAIR = "calibration", "compensation", "comparison", "repair"
Data = Callable[[str], contextlib.AbstractContextManager[tuple[Iterable[Any], Callable[[Any], Tensor | None]]]]


def prune_with(
    model: nn.Module,
    data: Data,
    config: PruningConfig,
    optimizers: Iterable[Optimizer] = (),
    *,
    root: nn.Module | None = None,
    ranks: Ranks | None = None,
    agree: Callable[[PruningPlan], None] = lambda plan: None,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
    record: Callable[[GroupTable, PruningPlan], None] = lambda table, plan: None,
    dry_run: bool = False,
) -> tuple[GroupTable, PruningPlan]:
    """What :func:`prune` does, for callers that have to prepare something every time that batches are run.

    Args:
        model: The model itself.
        data: Called with what the batches are for, ``"calibration"``, ``"compensation"`` (what a repair could make up for),
            ``"comparison"`` (of candidates) or ``"repair"``; gives
            a context in which they are run, with the batches, the same ones every time, and the loss function.
        config: The configuration.
        optimizers: Optimizers over the model's parameters, cut along.
        root: The module that holds the model, if there is more to a forward pass than the model.
        ranks: The processes of a distributed run.
        agree: Called with every plan before it is carried out; raises if another process has a different one.
        progress: Wraps the sequence of blocks that are repaired.
        record: Called with the result right after the last cut; if it raises, all cuts are undone.
        dry_run: Plan, in one iteration, and cut nothing.
    """
    total = None if ranks is None else ranks.sum
    blocks = config.limits.blocks
    group_sets = find_group_sets(model, blocks=blocks)
    config.check(model, group_sets)
    steps = config.steps(model, group_sets)
    undos: list[Callable[[], None]] = []
    table: GroupTable | None = None
    made: PruningPlan | None = None
    try:
        for number, step in enumerate(steps[-1:] if dry_run else steps):
            group_sets = find_group_sets(model, blocks=blocks)
            try:
                step.check(model, group_sets)
            except SmallBudgetError:
                if made is None and step is steps[-1]:
                    raise
                continue
            with data(CALIBRATION) as (batches, loss):
                statistics = calibrate(model, group_sets, batches, loss, step, root=root, ranks=ranks)

            if step.compensates:
                with data(COMPENSATION) as (batches, loss):
                    statistics.unexplained = _unexplained(model, group_sets, batches, loss, root, progress, total)

            def measure(
                candidate: PruningPlan, sets: Sequence[GroupSet] = group_sets, step: PruningConfig = step
            ) -> float:
                with data(COMPARISON) as (batches, loss):
                    value = masked_loss(model, sets, candidate, batches, loss, step, root=root)
                return value if total is None else float(total(torch.tensor(value, dtype=torch.float64)))

            ranked, plan = make_plan(model, group_sets, statistics, step, measure=measure)
            table = ranked if table is None else table.then(ranked)
            agree(plan)
            if not dry_run:
                with data(REPAIR) as (batches, loss):
                    plan, weights = repair(
                        model,
                        group_sets,
                        plan,
                        statistics,
                        batches,
                        loss,
                        step,
                        root=root,
                        progress=progress,
                        total=total,
                    )
                undos.append(cut(model, plan, optimizers, weights))
                del weights
            made = plan if made is None else _composed(made, plan, number + 1)
        assert table is not None
        assert made is not None
        record(table, made)
    except BaseException:
        for undo in reversed(undos):
            undo()
        raise
    return table, made


def _unexplained(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    root: nn.Module | None,
    progress: Callable[[Sequence[str]], Iterable[str]],
    total: Callable[[Tensor], Tensor] | None,
) -> dict[tuple[str, str], Tensor]:
    try:
        return unexplained_shares(model, group_sets, batches, forward, root=root, progress=progress, total=total)
    except UnsupportedModelError:
        # such a model is not repaired either, of which repair warns
        return {}


def _composed(first: PruningPlan, later: PruningPlan, iterations: int) -> PruningPlan:
    plan = first.then(later)
    before = {"parameters_before": first.info["parameters_before"], "iterations": iterations}
    return replace(plan, info={**plan.info, **before})


@contextlib.contextmanager
def masked(model: nn.Module, group_sets: Sequence[GroupSet], plan: PruningPlan) -> Iterator[None]:
    """Let the model compute what it would after the cut: its consumers do not read what is to leave. Undone at the end."""
    by_key = {s.key: s for s in group_sets}
    before: list[tuple[Tensor, int, Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for entry in plan.group_entries:
                group_set = by_key[entry.key]
                removed = group_set.kept_to_removed(entry.kept)
                for part in group_set.masked:
                    weight: Tensor = model.get_parameter(part.parameter)
                    if sharding.is_sharded(weight) and sharding.sharded_dim(weight) == part.dim:
                        raise UnsupportedStrategyError(
                            f"{part.parameter!r} is sharded along dimension {part.dim}, along which its groups lie, so plans"
                            f" cannot be compared by masks. Name one criterion in place of importance={AUTO!r}."
                        )
                    weight = sharding.local(weight)
                    columns = part.index[removed].flatten().to(weight.device)
                    before.append((weight, part.dim, columns, weight.index_select(part.dim, columns)))
                    weight.index_fill_(part.dim, columns, 0.0)
        with passed_over(model, plan.removed_blocks):
            yield
    finally:
        with torch.no_grad():
            for tensor, dim, columns, values in before:
                tensor.index_copy_(dim, columns, values)


@torch.no_grad()
def masked_loss(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    plan: PruningPlan,
    batches: Iterable[Any],
    loss_fn: Callable[[Any], Tensor | None],
    config: PruningConfig,
    *,
    root: nn.Module | None = None,
) -> float:
    """Mean loss of the model, cut as planned, over the calibration batches that were held back (all, if none were).

    Raises:
        CalibrationError: If there is no batch.
    """
    losses: list[Tensor] = []
    sharding.reshard(model)
    with evaluation_mode(model if root is None else root), masked(model, group_sets, plan):
        chosen = list(batches)
        held = [b for number, b in enumerate(chosen) if config.holds_back(number)]
        for batch in held or chosen:
            loss = loss_fn(batch)
            if isinstance(loss, Tensor):
                losses.append(loss.float())
    if not losses:
        raise CalibrationError("No calibration batch gave a loss to choose a plan by.")
    return float(torch.stack(losses).mean())


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
    total: Callable[[Tensor], Tensor] | None = None,
) -> tuple[PruningPlan, dict[str, Tensor]]:
    """Compute new weights for the consumers of what leaves, as configured; the model is not changed.

    Args:
        model: The dense model.
        group_sets: Its group sets.
        plan: The plan.
        statistics: What calibration collected.
        batches: The calibration batches once more; read only by ``"least_squares"``.
        forward: Runs one batch through the model.
        config: The configuration.
        root: The module that holds the model, if ``forward`` runs more than the model.
        progress: Wraps the sequence of blocks.
        total: Sums a tensor over the processes that calibrate on batches of their own, if there are several.

    Returns:
        The plan, with biases that the repair adds, and the new weights, both for :func:`lit_prune.apply_plan`. A model
        whose blocks cannot be run one after the other gets a warning and no new weights.
    """
    if config.repair == "bias":
        return bias_fold(model, group_sets, plan, statistics)
    if config.repair == "least_squares":
        try:
            return plan, least_squares(
                model, group_sets, plan, batches, forward, root=root, progress=progress, total=total
            )
        except UnsupportedModelError as error:
            warnings.warn(f"Nothing was repaired: {error}", stacklevel=2)
    return plan, {}
