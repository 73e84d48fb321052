"""Least-squares repair of layers anywhere in a model, in the order in which they run.

Where the model is no chain of decoder layers (residual networks of convolutions, U-Nets, branches), every layer that reads
groups is refitted so that, on what it reads in the model as pruned and repaired so far, it gives what it gave in the dense
model, its bias included if it has one: one ridge regression on the patches that its kernel sees, as in He et al., Channel
Pruning, ICCV 2017.

Layers that read the same tensor share a pass over the calibration batches, and so do consecutive layers where there are more
than :data:`STAGES` of them. The cost is one forward pass over the batches to learn the order, one for each such stage, and
one for as many stages as what their layers should give fits in :data:`TARGET_BYTES`; all but the first of these passes end
behind the last layer that they are for.
"""

from __future__ import annotations

import contextlib
import math
import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.architectures.features import feature_dim
from lit_prune.architectures.layers import passed_over
from lit_prune.calibration.module_checks import relative_difference, tolerance
from lit_prune.distributed import shards
from lit_prune.errors import UnsupportedModelError
from lit_prune.groups import GroupSet
from lit_prune.plan import PruningPlan
from lit_prune.repair.equations import Equations
from lit_prune.repair.passes import Call, Data, Passes, Replacements, sample
from lit_prune.repair.patches import count_rows, input_rows, is_product, matrix_of, output_rows, taps, weight_of
from lit_prune.repair.reruns import WAY_OUT
from lit_prune.surgery.plan_cuts import parameter_cuts
from lit_prune.surgery.tensors import DimensionCut
from lit_prune.torch_internals import version_of

# measured with benchmarks/convolutions.py at 80% and 90%: from 0.02 to 1 hardly a difference, 4 is worse
DAMPING = 1.0
# the most passes over the pruned model; layers that share one do not see each other's repair
STAGES = 64
# memory for what layers should give, of all batches
TARGET_BYTES = 2**28
# rows (tokens, positions of images) that a layer is fitted to, at most: so many for each of its inputs, and at least so many
ROWS_PER_INPUT, FEWEST_ROWS = 16, 2**14
# inputs of a row, at most: the matrix of all pairs takes 2 GB then, and solving takes several of them
MOST_INPUTS = 2**14
# rounding adds up over the layers before
_SLACK = 8.0


@dataclass(eq=False)
class _Layer:
    """A layer that reads groups, and what a plan leaves of it.

    Attributes:
        name: Its path.
        module: The layer.
        inputs: Input features that stay.
        outputs: Outputs that stay.
        loses_inputs: Whether it loses inputs.
        first: When it was first called, counted in calls of such layers.
        rows: Rows that it gave in all batches.
        calls: How often it was called in all batches.
        source: What identifies the tensor that its first call read; later, the number of the first layer that read it.
        sample: Some values of what its first call gave.
        targets: By batch and call, how many rows it gave in the dense model, those it is fitted to, and how much each counts.
    """

    name: str
    module: nn.Module
    inputs: Tensor
    outputs: Tensor
    loses_inputs: bool
    first: int | None = None
    rows: int = 0
    calls: int = 0
    source: Any = None
    sample: Tensor | None = None
    targets: list[list[tuple[int, Tensor, Tensor | None]]] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Number of inputs of a row."""
        return len(self.inputs) * taps(self.module)

    def chosen(self, call: Call, seed: int) -> Tensor:
        """The rows of a call that it is fitted to, drawn by a seed, the same in every pass."""
        output = call.output
        count, dim = count_rows(self.module, output), feature_dim(self.module)
        mask = call.mask(output if dim == -1 else output.movedim(dim, -1))
        rows = torch.arange(count) if mask is None else mask.flatten().nonzero().flatten().cpu()
        most = math.ceil(max(FEWEST_ROWS, ROWS_PER_INPUT * self.width) / max(self.calls, 1))
        if len(rows) > most:
            key = zlib.crc32(f"{self.name}/{call.batch}/{call.number}/{seed}".encode())
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(key))
            rows = rows[order[:most].sort().values]
        return rows.to(output.device)


@torch.no_grad()
def refit_in_order(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    plan: PruningPlan,
    data: Data,
    *,
    damping: float | None = None,
    root: nn.Module | None = None,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Refit every layer that reads groups, from the first one that loses inputs on, in the order in which they run.

    Args:
        model: The dense model; its weights are others meanwhile, and as before afterwards.
        group_sets: Its group sets.
        plan: The plan.
        data: Gives the calibration batches and the function that runs one, anew for every pass, see :class:`Passes`.
        damping: The damping of :func:`lit_prune.repair.regression.ridge` in units of inputs / rows of each layer,
            :data:`DAMPING` if ``None``.
        root: The module that holds the model, if the function runs more than the model.
        progress: Wraps the names of the stages, for a progress bar.
        all_reduce: Sums a tensor over the processes that calibrate on batches of their own, if there are several.
        seed: Seed of the choice of rows.

    Returns:
        New weights and biases, in the shape after the cut, by parameter name. Layers that were not called, or not called
        alike in the dense and the pruned model, keep theirs; so do convolutions in several groups of channels, and, with a
        warning, layers that read more than :data:`MOST_INPUTS` inputs, or that compute more than a product with their weight.

    Raises:
        UnsupportedModelError: If parameters are sharded, or the batches are not the same in every pass.
    """
    shards.reshard(model)
    if shards.any_sharded(model.parameters()) is not None:
        raise UnsupportedModelError(
            "The model is sharded, and its layers are no chain of blocks: layers are refitted in the order in which they run"
            " only where every process holds the whole model. Use repair=None."
        )
    cuts = parameter_cuts(model, plan, group_sets)
    # processes that run batches together may wait for each other behind the layers
    passes = Passes(model, data, root, stops=all_reduce is None)
    layers = _in_order(_layers(model, group_sets, cuts), passes, all_reduce)
    pruned = _Pruned(model, group_sets, plan, {layer.name for layer in layers})
    # what loses inputs elsewhere may run before any of the layers
    losers = (n for n, layer in enumerate(layers) if layer.loses_inputs or pruned.elsewhere)
    start = next(losers, None)
    if start is None:
        return {}
    passes.check_batches_by(layers[0].name)
    found: dict[str, Tensor] = {}
    stages = _stages(layers[start:])
    waiting: list[list[_Layer]] = []
    for number, _ in enumerate(progress([_label(s) for s in stages])):
        stage = stages[number]
        if not waiting:
            waiting = _affordable(stages[number:])
            _collect_targets([layer for s in waiting for layer in s], passes, seed)
        waiting.pop(0)
        for layer, equations in _equations(stage, passes, pruned, seed):
            equations.add_up(all_reduce)
            if int(equations.rows):
                _refit(layer, equations, DAMPING if damping is None else damping, pruned.values, found)
    return found


def _label(stage: Sequence[_Layer]) -> str:
    return stage[0].name if len(stage) == 1 else f"{stage[0].name} to {stage[-1].name}"


def _layers(
    model: nn.Module, group_sets: Sequence[GroupSet], cuts: Mapping[str, Sequence[DimensionCut]]
) -> dict[str, _Layer]:
    """The layers that can be refitted, by path."""
    layers: dict[str, _Layer] = {}
    for part in (p for s in group_sets for p in s.repairable):
        module = model.get_submodule(part.module)
        if part.module in layers or not is_product(module) or part.parameter != f"{part.module}.weight":
            continue
        weight = model.get_parameter(part.parameter)
        kept = {cut.dim: cut.kept.to(weight.device) for cut in cuts.get(part.parameter, ())}
        inputs, outputs = (
            kept.get(dim, torch.arange(weight.shape[dim], device=weight.device)) for dim in (part.dim, 1 - part.dim)
        )
        if len(inputs) and len(outputs):
            layers[part.module] = _Layer(
                part.module, module, inputs, outputs, loses_inputs=len(inputs) < weight.shape[part.dim]
            )
    wide = [layer.name for layer in layers.values() if layer.width > MOST_INPUTS]
    if wide:
        warnings.warn(
            f"{wide} still read more than {MOST_INPUTS:,} inputs each, too many to refit them; they keep their weights."
            " Layers behind them make up for some of it.",
            stacklevel=2,
        )
    return {name: layer for name, layer in layers.items() if name not in wide}


def _in_order(
    layers: Mapping[str, _Layer], passes: Passes, all_reduce: Callable[[Tensor], Tensor] | None
) -> list[_Layer]:
    """The layers that were called, in the order of their first calls; all processes find the same order."""
    # what the first batch's layers read is kept until it is over, so that no other tensor gets its place in memory
    alive: list[Tensor] = []
    others: dict[str, None] = {}

    def take(call: Call) -> int:
        layer, x = layers[call.name], call.inputs
        if not call.is_product:
            others[call.name] = None
        if layer.first is None:
            layer.first = sum(other.first is not None for other in layers.values())
            layer.source = (x.data_ptr(), x.shape, x.stride(), version_of(x))
            layer.sample = sample(call.output)
            alive.append(x)
        return count_rows(call.module, call.output)

    def use(taken: Mapping[str, Sequence[int]]) -> None:
        alive.clear()
        for name, counts in taken.items():
            layers[name].rows += sum(counts)
            layers[name].calls += len(counts)

    passes.run(layers, take, use)
    if others:
        warnings.warn(
            f"{list(others)} compute more than a product with their weight, by a forward of their own; they keep their weights."
            " Layers behind them make up for some of it.",
            stacklevel=3,
        )
    return _agreed({name: layer for name, layer in layers.items() if name not in others}, all_reduce)


def _agreed(layers: Mapping[str, _Layer], all_reduce: Callable[[Tensor], Tensor] | None) -> list[_Layer]:
    """The layers in the order of their first calls, with rows and sources that are the same in every process."""
    found = list(layers.values())
    sources = [layer.source for layer in found]
    numbers = torch.tensor(
        [
            [
                len(found) if layer.first is None else layer.first,
                number if layer.source is None else sources.index(layer.source),
                layer.rows,
                layer.first is not None,
                1,
            ]
            for number, layer in enumerate(found)
        ]
    )
    numbers = numbers if all_reduce is None else all_reduce(numbers)
    for layer, (_, source, rows, _, processes) in zip(found, numbers.tolist(), strict=True):
        layer.source, layer.rows = source // processes, rows // processes
    order = sorted(range(len(found)), key=lambda n: (int(numbers[n, 0]), n))
    return [found[n] for n in order if int(numbers[n, 3])]


def _stages(layers: Sequence[_Layer]) -> list[list[_Layer]]:
    """Layers that share a pass: those that read one tensor, and consecutive ones if there would be too many passes."""
    by_source: dict[int, list[_Layer]] = {}
    for layer in layers:
        by_source.setdefault(layer.source, []).append(layer)
    stages = list(by_source.values())
    each = math.ceil(len(stages) / STAGES)
    return [[layer for stage in stages[n : n + each] for layer in stage] for n in range(0, len(stages), each)]


def _affordable(stages: Sequence[list[_Layer]]) -> list[list[_Layer]]:
    """As many stages, at least one, as what their layers should give has memory for."""
    spent = 0
    chosen: list[list[_Layer]] = []
    for stage in stages:
        for layer in stage:
            rows = min(layer.rows, max(FEWEST_ROWS, ROWS_PER_INPUT * layer.width))
            spent += rows * len(layer.outputs) * layer.module.weight.element_size()  # type: ignore[operator]
        if chosen and spent > TARGET_BYTES:
            break
        chosen.append(stage)
    return chosen


def _collect_targets(layers: Sequence[_Layer], passes: Passes, seed: int) -> None:
    """Note what layers give in the dense model, on the rows that they are fitted to."""
    by_name = {layer.name: layer for layer in layers}

    def take(call: Call) -> tuple[int, Tensor, Tensor | None]:
        layer = by_name[call.name]
        if layer.sample is not None:
            _check_same(layer, sample(call.output), call.output.dtype)
        rows = layer.chosen(call, seed)
        wanted = output_rows(call.module, call.output, rows)[:, layer.outputs]
        return count_rows(call.module, call.output), wanted, call.influence(rows)

    def use(taken: Mapping[str, Sequence[tuple[int, Tensor, Tensor | None]]]) -> None:
        for layer in layers:
            layer.targets.append(list(taken.get(layer.name, ())))

    passes.run(by_name, take, use)


def _check_same(layer: _Layer, found: Tensor, precision: torch.dtype) -> None:
    """Refuse a layer whose first call gives something else than in the pass before; nothing in the model has changed."""
    assert layer.sample is not None
    apart = relative_difference(found, layer.sample)
    layer.sample = None
    if not apart <= tolerance(precision) * _SLACK:
        raise UnsupportedModelError(
            f"{layer.name} does not give what it gave on the same batch before (largest relative difference {apart:.3g}): the"
            " batches are not the same every time that they are run, or the model depends on a cache or another state."
            f" {WAY_OUT}"
        )


class _Pruned:
    """The model as pruned and repaired so far, by other values of its parameters: nothing reads what is removed.

    Args:
        model: The model.
        group_sets: Its group sets.
        plan: The plan.
        names: The layers that can be refitted.

    Attributes:
        values: The other values.
        elsewhere: Whether other modules than these layers lose something.
    """

    def __init__(
        self, model: nn.Module, group_sets: Sequence[GroupSet], plan: PruningPlan, names: Collection[str]
    ) -> None:
        self.values = Replacements(model)
        self._model = model
        self._skipped = plan.removed_blocks
        self.elsewhere = bool(self._skipped)
        by_key = {s.key: s for s in group_sets}
        for entry in plan.group_entries:
            group_set = by_key[entry.key]
            removed = group_set.kept_to_removed(entry.kept)
            for part in group_set.masked:
                self.elsewhere = self.elsewhere or part.module not in names
                value = self.values[part.parameter]
                value.index_fill_(part.dim, part.index[removed].flatten().to(value.device), 0.0)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let the model be this one."""
        with self.values.applied(), passed_over(self._model, self._skipped):
            yield


def _equations(stage: Sequence[_Layer], passes: Passes, pruned: _Pruned, seed: int) -> list[tuple[_Layer, Equations]]:
    """The normal equations of layers, from what they read in the pruned model and give in the dense one."""
    by_name = {layer.name: layer for layer in stage}
    equations = {layer.name: Equations(layer.width, len(layer.outputs), layer.module) for layer in stage}

    def take(call: Call) -> tuple[int, Tensor]:
        layer = by_name[call.name]
        kept = None if len(layer.inputs) == call.inputs.shape[feature_dim(call.module)] else layer.inputs
        given = input_rows(call.module, call.inputs, call.output.shape, layer.chosen(call, seed), kept)
        return count_rows(call.module, call.output), given

    def use(taken: Mapping[str, Sequence[tuple[int, Tensor]]]) -> None:
        for layer in stage:
            wanted, given = layer.targets.pop(0), taken.get(layer.name, ())
            # a layer that other rows reach than in the dense model (an expert) says nothing
            if [count for count, _ in given] != [count for count, _, _ in wanted]:
                equations[layer.name].give_up()
                continue
            for (_, a), (_, b, scale) in zip(given, wanted, strict=True):
                equations[layer.name].add(a, b, scale)

    passes.run(by_name, take, use, within=pruned.running(), compare=not pruned.elsewhere)
    return [(layer, equations[layer.name]) for layer in stage]


def _refit(layer: _Layer, equations: Equations, damping: float, values: Replacements, found: dict[str, Tensor]) -> None:
    """Solve the equations of a layer, and let the pruned model have the solution."""
    name = f"{layer.name}.weight"
    whole = values[name]
    matrix = matrix_of(layer.module, whole)
    places = taps(layer.module)
    columns = (layer.inputs[:, None] * places + torch.arange(places, device=whole.device)).flatten()
    prior = matrix[layer.outputs][:, columns]
    bias = values[f"{layer.name}.bias"] if getattr(layer.module, "bias", None) is not None else None
    solved, shift = equations.solve(prior, None if bias is None else bias[layer.outputs], damping)
    found[name] = weight_of(layer.module, solved)
    if bias is not None and shift is not None:
        bias[layer.outputs] = shift
        found[f"{layer.name}.bias"] = shift
    matrix = matrix.clone()
    matrix[layer.outputs[:, None], columns] = solved
    whole.copy_(weight_of(layer.module, matrix))
