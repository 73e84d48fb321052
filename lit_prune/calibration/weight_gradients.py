"""Statistics of weight gradients, reduced the moment each gradient is ready."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.calibration.accumulator import _Accumulator
from lit_prune.calibration.mask_gradients import watch_block
from lit_prune.calibration.reduce import add_line, product_lines
from lit_prune.calibration.statistic_registry import GradientStatistic, get_statistic
from lit_prune.calibration.statistics import Statistics
from lit_prune.calibration.terms import Term
from lit_prune.distributed import shards
from lit_prune.distributed.ranks import Ranks
from lit_prune.errors import CalibrationError
from lit_prune.groups import BLOCK, GroupSet


def _identity(values: Tensor) -> Tensor:
    return values


def _everywhere(flag: bool, ranks: Ranks | None) -> bool:
    return flag if ranks is None else ranks.all(flag)


def _function(term: Term) -> Callable[[Tensor], Tensor] | None:
    """The function of a batch's gradient that a term's statistic is the mean of; ``None`` for the gradient itself."""
    statistic = get_statistic(str(term.statistic))
    assert isinstance(statistic, GradientStatistic)
    return statistic.function


class _GradientCollector:
    """Takes each parameter's gradient the moment it is ready, adds it to what the terms need, and frees it.

    Hooks of parameters that would step an optimizer within the backward pass have to be off meanwhile, see
    :func:`lit_prune.surgery.references.suspended_hooks`.
    """

    def __init__(
        self,
        model: nn.Module,
        root: nn.Module,
        group_sets: Sequence[GroupSet],
        terms: Sequence[Term],
        mode: str,
        accumulator: _Accumulator,
        ranks: Ranks | None,
    ) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._model = model
        self._root = root
        self._mode = mode
        self._terms = [t for t in terms if not t.per_group]
        self._groupwise = [t for t in terms if t.per_group]
        self._blocks = {s.key: model.get_submodule(s.name) for s in group_sets if s.kind == BLOCK and self._groupwise}
        self._block_gradients: dict[tuple[str, str], Tensor] = {}
        self._uses: dict[str, list[tuple[GroupSet, int]]] = {}
        for group_set in group_sets:
            for position, part in enumerate(group_set.slices):
                if any(t.applies(group_set, part) for t in (*self._terms, *self._groupwise)):
                    self._uses.setdefault(part.parameter, []).append((group_set, position))
        self._parameters = {name: parameters[name] for name in self._uses}
        # by parameter and term: the dimensions along which its groups lie
        self._dims: dict[str, dict[Term, list[int]]] = {
            name: {
                term: list(dict.fromkeys(s.slices[p].dim for s, p in uses if term.applies(s, s.slices[p])))
                for term in dict.fromkeys([*self._terms, *self._groupwise[:1]])
            }
            for name, uses in self._uses.items()
        }
        frozen = [name for name, p in self._parameters.items() if not p.requires_grad]
        if frozen:
            raise CalibrationError(
                f"{len(frozen)} parameters to be scored by their gradients are frozen (requires_grad=False), the first"
                f" {frozen[:3]}. Unfreeze them, or use a criterion that needs no gradient, such as importance='wanda'."
            )
        self._accumulator = accumulator
        # by term, parameter and dimension: sums over all other dimensions, and over the batches
        self._lines: dict[tuple[Term, str, int], Tensor] = {}
        self._reduced: dict[tuple[Term, tuple[str, str], int], Tensor] = {}
        self._finite: list[Tensor] = []
        self._batch_finite: dict[str, Tensor] = {}
        # of the batch at hand: the derivative of the loss by a mask of the groups
        self._mask_gradients: dict[tuple[str, str], Tensor] = {}
        self._handles: list[Any] = []
        self._batches = 0
        self._ranks = ranks
        # gradients that wait for those before them: the processes have to average them in one order, the last layers first
        self._waiting: dict[str, Tensor] = {}
        self._order = list(reversed(self._parameters)) if ranks is not None and ranks.mean_gradients else []
        self._next = 0

    def __enter__(self) -> _GradientCollector:
        scored = {id(p) for p in self._parameters.values()}
        everything = list({id(p): p for module in (self._root, self._model) for p in module.parameters()}.values())
        self._flags = [(p, p.requires_grad) for p in everything]
        self._gradients = [(p, p.grad) for p in everything]
        for parameter in everything:
            parameter.grad = None
        # other networks of the root keep their flags: the loss may pass through them, or be of them alone
        for parameter in self._model.parameters():
            # FSDP2 fixes at its first forward which parameters it will ever reduce gradients of: leave it its flags
            if not shards.is_sharded(parameter):
                parameter.requires_grad_(id(parameter) in scored)
        for name, parameter in self._parameters.items():
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._hook(name)))
        for key, block in self._blocks.items():
            self._handles.append(watch_block(block, self._taker(key)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter, requires_grad in self._flags:
            parameter.requires_grad_(requires_grad)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient

    def start_batch(self) -> None:
        """Get ready for the backward pass of a batch."""
        self._batch_finite = {}
        self._block_gradients = {}
        self._next = 0

    def end_batch(self, unreached: Sequence[str]) -> None:
        """Finish a batch; ``unreached`` are modules whose masks its backward pass did not reach."""
        seen = self._waiting.keys() | self._batch_finite.keys()
        missing = [name for name in self._parameters if name not in seen]
        for name in missing if self._order else ():
            self._waiting[name] = torch.zeros_like(self._parameters[name])
        self._average_waiting()
        missing += unreached
        if not _everywhere(not missing, self._ranks):
            raise CalibrationError(
                f"No gradient reached {missing[:3] or 'some place on another process'} ({len(missing)} places) in"
                f" calibration batch {self._batches}; the loss does not depend on them. If they run under no_grad (a frozen"
                " backbone), use a criterion that needs no gradient, such as importance='wanda', prune another part"
                " (model_path), or, where no description covers the model, leave them out of the groups by"
                " lit_prune.trace(model, batches, loss_fn, protect=[...]). If they run within torch.utils.checkpoint, give it"
                " use_reentrant=False."
            )
        self._take_mask_gradients()
        # one flag a parameter, read only after the last batch: no synchronisation with the device per batch
        if self._parameters:
            self._finite.append(torch.stack([self._batch_finite[name] for name in self._parameters]))
        for parameter, _ in self._gradients:
            parameter.grad = None
        self._batches += 1

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def hook(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            parameter.grad = None
            if self._order:
                self._waiting[name] = gradient
                self._average_waiting()
            else:
                self._take(name, gradient)

        return hook

    def _taker(self, key: tuple[str, str]) -> Callable[[Tensor], None]:
        return lambda derivatives: self._add(self._block_gradients, key, derivatives.sum().view(1))

    def _average_waiting(self) -> None:
        assert self._ranks is not None or not self._order
        while self._next < len(self._order) and self._order[self._next] in self._waiting:
            name = self._order[self._next]
            self._take(name, self._ranks.mean(self._waiting.pop(name)))  # type: ignore[union-attr]
            self._next += 1

    def _take(self, name: str, gradient: Tensor) -> None:
        parameter = self._parameters[name]
        gradient = shards.local(gradient)
        weight = shards.local(parameter.detach())
        wanted: list[tuple[Callable[[Tensor], Tensor], int, Tensor]] = []
        masked: dict[int, Tensor] = {}
        accumulated: dict[str, Callable[[Tensor], Tensor] | None] = {}
        for term, dims in self._dims[name].items():
            if term.per_group:
                masked = {dim: weight.new_zeros(weight.shape[dim], dtype=torch.float32) for dim in dims}
                wanted += [(_identity, dim, line) for dim, line in masked.items()]
                continue
            function = _function(term)
            if self._mode == "elementwise" or function is None:
                accumulated[str(term.statistic)] = function
            else:
                lines = {dim: self._line(term, name, dim, weight) for dim in dims}
                if term.of_product is not None:
                    wanted += [(term.of_product, dim, line) for dim, line in lines.items()]
                    continue
                values = term.function(weight.float(), function(gradient.float()))
                for dim, line in lines.items():
                    add_line(line, values, dim)
        self._batch_finite[name] = product_lines(weight, gradient, wanted).isfinite()
        for group_set, position in self._uses[name] if masked else ():
            part = group_set.slices[position]
            if self._groupwise[0].applies(group_set, part):
                self._add(self._mask_gradients, group_set.key, shards.sum_by_group(part, masked[part.dim], parameter))
        for statistic, function in accumulated.items():
            value = gradient if function is None else function(gradient.float())
            self._accumulator.add((statistic, name), value)

    def _line(self, term: Term, name: str, dim: int, weight: Tensor) -> Tensor:
        key = (term, name, dim)
        if key not in self._lines:
            self._lines[key] = weight.new_zeros(weight.shape[dim], dtype=torch.float32)
        return self._lines[key]

    def _take_mask_gradients(self) -> None:
        shared = shards.any_sharded(self._parameters.values())
        if shared is not None and self._mask_gradients:
            keys = sorted(self._mask_gradients)
            whole = shards.sum_over_shards(torch.cat([self._mask_gradients[k] for k in keys]), shared)
            sizes = [len(self._mask_gradients[k]) for k in keys]
            self._mask_gradients = dict(zip(keys, whole.split(sizes), strict=True))
        if self._blocks:
            of_blocks = torch.cat([self._block_gradients.pop(key) for key in self._blocks])
            of_blocks = of_blocks if self._ranks is None else self._ranks.mean(of_blocks)
            self._mask_gradients.update(zip(self._blocks, of_blocks.split(1), strict=True))
        for key, derivative in self._mask_gradients.items():
            for term in self._groupwise:
                self._add(self._reduced, (term, key, 0), term.function(derivative))
        self._mask_gradients = {}

    @staticmethod
    def _add(store: dict[Any, Tensor], key: Any, value: Tensor) -> None:
        if key in store:
            store[key] += value
        else:
            store[key] = value.clone()

    def finish(self, statistics: Statistics) -> None:
        """Turn sums into means, and refuse gradients that were not finite."""
        if self._finite:
            finite = torch.stack(self._finite)
            finite = (finite if self._ranks is None else self._ranks.minimum(finite.int()).bool()).cpu()
            if not bool(finite.all()):
                batch, position = (int(i) for i in (~finite).nonzero()[0])
                raise CalibrationError(
                    f"The gradient of {list(self._parameters)[position]!r} is not finite in calibration batch {batch}."
                    " Nothing was pruned."
                )
        for name, uses in self._uses.items():
            for group_set, position in uses:
                part = group_set.slices[position]
                for term in self._terms:
                    line = self._lines.get((term, name, part.dim))
                    if line is not None and term.applies(group_set, part):
                        reduced = shards.sum_by_group(part, line, self._parameters[name])
                        self._reduced[term, group_set.key, position] = reduced
        sums = self._accumulator.finish()
        for value in (*self._reduced.values(), *sums.values()):
            value /= self._batches
        statistics.reduced = self._reduced
        for (statistic, name), value in sums.items():
            statistics.elementwise.setdefault(statistic, {})[name] = value
