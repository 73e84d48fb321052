"""Learning which groups to remove, with the rest of the model as it will be: gates on all groups, trained under the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from lit_prune.architectures import find_group_sets, find_model
from lit_prune.architectures.features import output_dim
from lit_prune.arguments import BATCHES, COUNT, FLAG, Rule, check_fields, optional
from lit_prune.calibration.agreement import Agreement
from lit_prune.calibration.divergence import mixed_loss
from lit_prune.calibration.evaluation import evaluation_mode, only_trained
from lit_prune.calibration.gates import Gates, again_and_again, unreached
from lit_prune.calibration.precision import loss_scale
from lit_prune.config import AUTO, PruningConfig
from lit_prune.detection import find_or_trace
from lit_prune.distributed.ranks import Ranks
from lit_prune.errors import ArgumentValueError, CalibrationError
from lit_prune.group_data import keep_group_sets
from lit_prune.groups import BLOCK, GroupSet
from lit_prune.pipeline import Data, prune_with
from lit_prune.ranking.gate_scores import GateScores
from lit_prune.ranking.table import GroupTable
from lit_prune.repair.input_grams import input_grams
from lit_prune.repair.predictors import predict
from lit_prune.surgery.references import suspended_hooks
from lit_prune.torch_internals import uncompiled

# how much gates are changed to measure the curvature
_SMALL = 0.1
_SHARE: Rule[float] = Rule("a number from 0 to 1", Annotated[float, Field(ge=0, le=1)])
_RULES: dict[str, Rule] = {
    "steps": COUNT,
    "distillation": _SHARE,
    "reconstruct": FLAG,
    "horizon": optional(COUNT),
    "refresh": COUNT,
}


@dataclass(frozen=True)
class GateOptions:
    """How gates are learned.

    Args:
        steps: Number of steps.
        distillation: Share of the loss that is the divergence from the whole model's output, the rest being the loss of the
            training step. Needs a model whose outputs have ``logits``, and one more forward pass a step.
        reconstruct: Whether what is removed is predicted from what stays, as the repair ``"least_squares"`` will do, in place
            of being 0. Holds two matrices of ``features ** 2`` numbers for each layer that reads groups.
        horizon: Steps that the averages of derivatives look back; ``None`` for half of ``steps``, 10 at least.
        refresh: Steps after which predictions are made anew for the set that is removed by then.

    Raises:
        ArgumentTypeError: If a value is of another type.
        ArgumentValueError: If one is out of its range.
    """

    steps: int = 100
    distillation: float = 0.0
    reconstruct: bool = True
    horizon: int | None = None
    refresh: int = 5

    def __post_init__(self) -> None:
        """Check the values."""
        check_fields(self, _RULES)


class GateTraining:
    """Gates of a model while they are learned: what happens in a step, whoever runs the steps.

    Args:
        model: The model.
        group_sets: Its group sets.
        table: The group table of a criterion, see :func:`first_table`.
        budget: Parameters to remove.
        config: The configuration of the pruning.
        options: How the gates are learned.

    Attributes:
        model: The model.
        gates: The gates; to be entered while steps are run.
        scores: What is learned.

    Raises:
        ArgumentValueError: If the criterion is no measure of damage that gates can begin with.
        UnsupportedModelError: If there are groups whose consumers cannot be observed.
    """

    def __init__(
        self,
        model: nn.Module,
        group_sets: Sequence[GroupSet],
        table: GroupTable,
        budget: int,
        config: PruningConfig,
        options: GateOptions,
    ) -> None:
        self.options = options
        self.gates = Gates(model, group_sets)
        horizon = options.horizon or max(10, options.steps // 2)
        self.scores = GateScores(model, group_sets, table, budget, config.limits, horizon)
        self.model = model
        self._group_sets = group_sets
        self._grams: dict[str, tuple[Tensor, float]] = {}
        # what is kept as the predictors see it
        self._basis = self.scores.kept
        self._sums: list[Tensor] = []
        # by group set
        self._samples = torch.zeros(len(group_sets), dtype=torch.float64)
        self.gates.set(self.scores.kept)

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.scores.steps >= self.options.steps

    def observe(self, data: Data, root: nn.Module, ranks: Ranks | None, *, resumed: bool = False) -> None:
        """Measure, on calibration batches, what predictions are made from, and the curvature of the loss by the gates.

        Args:
            data: Gives a context with the batches and the loss of one.
            root: The module that holds the model.
            ranks: The processes of a distributed run.
            resumed: Whether the curvature is known already.

        Raises:
            CalibrationError: If there are group sets whose gates the loss of no batch depends on.
        """
        all_reduce = None if ranks is None else ranks.sum
        if self.options.reconstruct:
            with data("gates") as (batches, loss):
                self._grams = input_grams(
                    self.model, self.gates.linear_layers, batches, loss, root=root, all_reduce=all_reduce
                )
        if not resumed:
            shares = self._predict([torch.ones_like(kept) for kept in self._basis])
            self.scores.set_shares(shares)
            with data("gates") as (batches, loss), evaluation_mode(root), suspended_hooks(root), self.gates:
                line = self._curvature(batches, loss)
            trace, count, *samples = (line if ranks is None else ranks.sum(line)).tolist()
            if count:
                if missing := [s.name for s, number in zip(self._group_sets, samples, strict=True) if not number]:
                    raise unreached(missing)
                self.scores.measure_unit(trace / count)
            self.scores.start(shares)
            self._basis = self.scores.kept
        self.scores.set_shares(self._predict(self._basis))
        self.gates.set(self.scores.kept)

    def _curvature(self, batches: Iterable[Any], loss_fn: Callable[[Any], Any]) -> Tensor:
        r"""Sum over batches of an estimate of the trace of the loss's Hessian by the gates, and what it is of.

        For random signs r the mean of :math:`r^T(g(1+\epsilon r)-g(1-\epsilon r))/2\epsilon` is the trace (Hutchinson). A batch
        without a loss does not count.

        Returns:
            The sum, the number of batches, and by group set the number of samples whose loss depends on its gates (float64).
        """
        generator = torch.Generator().manual_seed(0)
        total = torch.zeros(2 + len(self._group_sets), dtype=torch.float64)
        for batch in batches:
            drawn = (torch.randint(0, 2, k.shape, generator=generator) for k in self._basis)
            signs = [2.0 * sign - 1 for sign in drawn]
            slopes = [self._slope(batch, loss_fn, [_SMALL * turn * sign for sign in signs]) for turn in (1, -1)]
            found = [slope for slope in slopes if slope is not None]
            if len(found) == len(slopes):
                total += torch.stack(found).sum(dim=0) / 2
        return total

    def _slope(self, batch: Any, loss_fn: Callable[[Any], Any], changes: Sequence[Tensor]) -> Tensor | None:
        """What a batch adds to :meth:`_curvature` where the gates are so changed; ``None`` without a loss."""
        scale = loss_scale()
        with torch.enable_grad(), self.gates.open(), self.gates.changed_by(changes):
            loss = loss_fn(batch)
            if not isinstance(loss, Tensor):
                self.gates.forget()
                return None
            if loss.requires_grad:
                loss.backward()
        slopes, _, samples = self.gates.take(scale)
        parts = zip(changes, slopes, samples, strict=True)
        along = sum(float((change * slope).sum()) / max(number, 1) for change, slope, number in parts)
        return torch.tensor([along / _SMALL**2, 1, *samples], dtype=torch.float64)

    def _predict(self, kept: Sequence[Tensor]) -> list[Tensor]:
        """Make predictions for a set of kept groups, and return the shares of all groups that they leave."""
        self.gates.predictors.clear()
        self.gates.set(kept)
        shares = {s.key: torch.zeros(s.size, dtype=torch.float64) for s in self._group_sets}
        for name, sets in self.gates.parts.items():
            made = None
            if name in self._grams:
                gram, tokens = self._grams[name]
                module = self.model.get_submodule(name)
                whole: Any = module.weight
                weight: Tensor = whole.detach()
                keep = self.gates.mask_of(name, len(gram), gram.device)
                groups = [index for _, index in sets]
                made = predict(gram, tokens, groups, keep, weight if output_dim(module) == 0 else weight.T)
            if made is not None:
                self.gates.predictors[name] = made.matrix
            # of several consumers, the one where the others can make up for least
            for number, (group_set, _) in enumerate(sets):
                share = torch.ones(group_set.size) if made is None else made.shares[number].cpu()
                shares[group_set.key] = torch.maximum(shares[group_set.key], share)
        return [
            torch.ones_like(v) if s.kind == BLOCK else v for s, v in zip(self._group_sets, shares.values(), strict=True)
        ]

    def accumulate(self, scale: float = 1.0) -> None:
        """Take the derivatives that a backward pass left, of a loss that was multiplied by ``scale``."""
        first, second, samples = self.gates.take(scale)
        line = torch.cat([*first, *second])
        self._sums.append(line)
        self._samples += torch.tensor(samples)

    def step(self, ranks: Ranks | None = None) -> bool:
        """Update the scores by all that was accumulated, on all processes, and set the gates.

        Group sets that no batch ran have no news.

        Returns:
            Whether the derivatives were finite; if not, nothing changed. Neither does it where nothing was accumulated.
        """
        sizes = [len(k) for k in self.scores.kept]
        total = torch.stack(self._sums).sum(dim=0) if self._sums else torch.zeros(2 * sum(sizes), dtype=torch.float64)
        line = torch.cat([total, self._samples])
        self._sums, self._samples = [], torch.zeros_like(self._samples)
        if ranks is not None:
            line = ranks.sum(line)
        *parts, samples = line.split([*sizes, *sizes, len(sizes)])
        if not samples.any():
            return True
        means = [part / number.clamp_min(1) for part, number in zip(parts, torch.cat([samples, samples]), strict=True)]
        if not self.scores.update(means[: len(sizes)], means[len(sizes) :], samples.tolist()):
            return False
        if self._grams and self.scores.steps % self.options.refresh == 0:
            self._basis = self.scores.kept
            self.scores.set_shares(self._predict(self._basis))
        self.gates.set(self.scores.kept)
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from, as tensors and numbers; the matrices are measured anew."""
        return {"scores": self.scores.state_dict(), "basis": list(self._basis)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; to be followed by :meth:`observe`."""
        self.scores.load_state_dict(state["scores"])
        self._basis = list(state["basis"])
        self.gates.set(self.scores.kept)


def first_table(
    model: nn.Module,
    data: Data,
    config: PruningConfig,
    *,
    root: nn.Module | None = None,
    ranks: Ranks | None = None,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> GroupTable:
    """Return the group table that gates begin with: that of the configured criterion, before any cut.

    Raises:
        ArgumentValueError: For ``importance="auto"``, whose candidates are of different units.
    """
    if config.importance == AUTO:
        raise ArgumentValueError(
            "Gates begin with the importance of one criterion; found importance='auto'. Name one, fisher for instance."
        )
    # what others make up for is measured where gates predict it
    config = replace(config, compensation=False, quality=None)
    return prune_with(model, data, config, root=root, ranks=ranks, progress=progress, dry_run=True)[0]


def learn_gates(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[Any], Tensor | None],
    config: PruningConfig,
    options: GateOptions | None = None,
    *,
    batches_per_step: int = 1,
    progress: Callable[[int, float, float], object] | None = None,
) -> list[Tensor]:
    """Learn the importance of all groups by gates, with the weights as they are; the model is not changed.

    Every step runs some batches with the groups removed that have the lowest scores, as many as the budget of ``config`` asks
    for, and moves the scores by the derivatives of the loss by all gates, see :mod:`lit_prune.ranking.gate_scores`.

    Args:
        model: The model, or a module that holds one.
        batches: Batches, gone through again and again; not an iterator. They are what the first importance is measured on,
            too.
        loss_fn: Runs one batch through the model and returns its loss, a mean over the batch.
        config: The configuration of the pruning; its criterion is what the scores begin with.
        options: How to learn; the defaults if ``None``.
        batches_per_step: Batches that are accumulated for a step.
        progress: Called after every step with its number, its loss, and the fraction of the groups removed at first that are
            kept now.

    Returns:
        By group set the importance of its groups in the unit of the loss, for the argument ``importance`` of
        :func:`lit_prune.prune`.

    Raises:
        ArgumentValueError: If the criterion is none that gates can begin with, or the configuration has a budget.
        BudgetError: If the ratio cannot be reached under the limits.
        CalibrationError: If a batch has no loss that depends on the gates.
        UnsupportedModelError: If there are groups whose consumers cannot be observed.

    Example::

        importance = lit_prune.learn_gates(model, batches, loss, config, GateOptions(steps=100))
        lit_prune.prune(model, batches, loss, config, importance=importance)
    """
    options = GateOptions() if options is None else options
    if config.limits.hidden:
        raise ArgumentValueError(
            f"Gates of hidden channels cannot be learned; expected no 'hidden' among kinds={config.limits.kinds}."
        )
    if config.budget is not None:
        raise ArgumentValueError(
            f"Gates are learned under a number of parameters; expected pruning_ratio, found {config.budget}."
        )
    batches = BATCHES.check("batches", batches)
    count = COUNT.check("batches_per_step", batches_per_step)
    eager = uncompiled(model)
    # a compiled module would compile the gates
    with torch.compiler.set_stance("force_eager"):
        if (found := find_or_trace(eager, batches, loss_fn)) is not None:
            keep_group_sets(eager, found)
        return _learned(model, find_model(model)[1], batches, loss_fn, config, options, count, progress)


def _learned(
    model: nn.Module,
    inner: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[Any], Tensor | None],
    config: PruningConfig,
    options: GateOptions,
    count: int,
    progress: Callable[[int, float, float], object] | None,
) -> list[Tensor]:
    def data(_: str) -> nullcontext[tuple[Iterable[Any], Callable[[Any], Tensor | None]]]:
        return nullcontext((batches, loss_fn))

    group_sets = find_group_sets(inner, blocks=config.limits.blocks)
    Gates(inner, group_sets)
    table = first_table(inner, data, config, root=model)
    training = GateTraining(inner, group_sets, table, config.budget_of_parameters(inner, group_sets), config, options)
    stream = again_and_again(batches)
    with ExitStack() as stack:
        stack.enter_context(only_trained(model))
        training.observe(data, model, None)
        stack.enter_context(suspended_hooks(model))
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(training.gates)
        agreement = stack.enter_context(Agreement(inner, training.gates)) if options.distillation else None
        stack.enter_context(torch.enable_grad())
        while not training.done:
            losses = []
            for batch in islice(stream, count):
                with training.gates.open(batch):
                    loss = loss_fn(batch)
                    if not isinstance(loss, Tensor):
                        raise CalibrationError(
                            f"The loss function returned a {type(loss).__name__}; expected a tensor."
                        )
                    if agreement is not None:
                        loss = mixed_loss(loss, agreement.take(), options.distillation)
                    if not loss.requires_grad:
                        raise unreached(training.gates.parts)
                    loss.backward()
                losses.append(float(loss.detach()))
                training.accumulate()
            if not training.step():
                raise CalibrationError(f"A derivative by a gate is not finite in step {training.scores.steps}.")
            if progress is not None:
                progress(training.scores.steps, sum(losses) / len(losses), training.scores.changed)
    return training.scores.importance()
