"""Statistics gathered while calibration batches run: gradients, squared gradients and input activations.

Gradients can be kept in two ways. ``elementwise`` keeps a tensor of each parameter's shape in CPU memory. ``streaming``
reduces each batch to one number a group as soon as a parameter's gradient is ready, for every statistic that enters a
criterion linearly (see METHODS: the second-order term and the mean absolute gradient are linear, the mean gradient
under an absolute value is not and stays elementwise, on the parameter's own device or offloaded). ``mask_gradient``, the
derivative of the loss by a mask of the groups, is a number a group and sample in either way (:mod:`lit_prune.masks`).

Nothing here reads a value back from the device between two batches; what has to be finite is looked at after the last.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from lit_prune import sharding
from lit_prune.activations import ACTIVATION, SUMS, ActivationObserver, ActivationStatistics, observed_modules
from lit_prune.distributed import Ranks
from lit_prune.errors import CalibrationError
from lit_prune.evaluation import evaluation_mode
from lit_prune.groups import BLOCK, GroupSet, Slice, check_names
from lit_prune.masks import MaskCollector, observable, watch_block
from lit_prune.reduction import add_line, product_lines
from lit_prune.token_masks import TokenMasks

if TYPE_CHECKING:
    from lit_prune.importance import Term

ELEMENTWISE = ("gradient", "absolute_gradient", "squared_gradient")
GROUPWISE = ("mask_gradient",)
STATISTICS = (*ELEMENTWISE, *GROUPWISE, *ACTIVATION)
MODES = ("streaming", "elementwise")
GRADIENT_DTYPES = ("float32", "bfloat16")


def _identity(values: Tensor) -> Tensor:
    return values


_PER_BATCH: dict[str, Callable[[Tensor], Tensor]] = {
    "gradient": _identity,
    "absolute_gradient": torch.abs,
    "squared_gradient": torch.square,
}


class _Skipped:
    def __repr__(self) -> str:
        return "SKIPPED"


SKIPPED: Final = _Skipped()
"""What a loss function returns for a batch that is not to count: neither its loss, nor what went through the model."""


@dataclass
class Statistics:
    """What a calibration collected.

    Args:
        batches: Number of calibration batches that counted.
        skipped: Number of calibration batches that had no loss, and did not count.
        tokens: Number of tokens that the first observed projection saw (0 without activation statistics).
        elementwise: By statistic and parameter, a tensor of the parameter's shape, a mean over the batches; of a sharded
            parameter only the local shard.
        reduced: By term, group-set key and position of the slice in its set, a float32 tensor of shape ``(groups,)``,
            a mean over the batches; of a sharded parameter only what the local shard adds to it. Terms of whole groups
            (``mask_gradient``) are at position 0, and whole in every process.
        activations: By module, the statistics of its inputs.
        loss: Mean calibration loss, if losses were computed.
        unexplained: By group-set key, what share of each group's contribution others cannot make up for, tensors of shape
            ``(groups,)``; see :func:`lit_prune.repair.unexplained_shares`. Empty if that was not asked for.
    """

    batches: int = 0
    skipped: int = 0
    elementwise: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    reduced: dict[tuple[Term, tuple[str, str], int], Tensor] = field(default_factory=dict)
    activations: dict[str, ActivationStatistics] = field(default_factory=dict)
    loss: float | None = None
    unexplained: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Number of tokens seen, 0 without activation statistics."""
        return max((a.count for a in self.activations.values()), default=0)

    def reduce_activations(self, ranks: Ranks) -> None:
        """Add up, in place, what several processes observed on their own batches; the counts of tokens may differ."""
        for name in sorted(self.activations):
            activation = self.activations[name]
            activation.count = int(ranks.sum(torch.tensor(activation.count)))
            activation.sums = {key: ranks.sum(value) for key, value in activation.sums.items()}

    def activation_of(self, part: Slice, statistic: str, weight: Tensor) -> Tensor:
        """A statistic of the input features that a slice's parameter multiplies, broadcastable against the parameter.

        A bias or a norm's scale multiplies the constant 1 in every token; so, for want of better, does an opaque slice.
        """
        name = statistic.removeprefix("activation_")
        module = self.activations.get(part.module)
        if not part.observable or part.input_dim is None or module is None:
            constant = {"mean_abs": 1.0, "l1": float(self.tokens), "l2": float(self.tokens) ** 0.5, "variance": 0.0}
            return torch.full((), constant[name], device=weight.device)
        shape = [1] * weight.dim()
        shape[part.input_dim] = -1
        return getattr(module, name).to(device=weight.device, dtype=torch.float32).view(shape)


def collect_statistics(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    batches: Iterable[Any],
    loss_fn: Callable[[Any], Any],
    terms: Iterable[Term],
    *,
    mode: str = "streaming",
    activations: bool = False,
    gradient_dtype: str = "float32",
    offload_gradients: bool = False,
    root: nn.Module | None = None,
    ranks: Ranks | None = None,
) -> Statistics:
    """Run calibration batches and collect what the terms of a criterion need.

    The model is put in eval mode, only those of its parameters that are scored by their gradients require gradients
    meanwhile (other parameters of ``root`` keep their flags), and everything (modes, flags, gradients that were there,
    hooks) is put back, also when an error is raised.

    Args:
        model: The model that ``group_sets`` describe.
        group_sets: The group sets to collect for.
        batches: The calibration batches; each is one micro-batch of the mean over batches.
        loss_fn: Runs one batch through the model and returns its loss, a scalar; or :data:`SKIPPED` for a batch that is
            not to count. ``None`` means the same where gradients are needed; elsewhere the batch counts without a loss.
            In a distributed run a batch that one process skips is skipped by all.
        terms: The terms whose statistics are needed.
        mode: ``"streaming"`` or ``"elementwise"``.
        activations: Observe all sums of the projections' inputs even if no term asks for them.
        gradient_dtype: What gradients are accumulated in, where a term needs them element by element: ``"float32"``, or
            ``"bfloat16"`` for half the memory and a mean of about two decimal digits.
        offload_gradients: Accumulate them in CPU memory, copied there while the device computes on. ``"elementwise"``
            always does.
        root: The module that holds the model and computes the loss, if there is more to it than the model: its modes
            and gradients are guarded as well.
        ranks: The processes of a distributed run, each of which calls this with its own batches. A batch is then the
            batches of all of them together, its gradient their mean, as in training; calibration ends with the first
            process that has no more. Every process gets the same statistics, or an error.

    Raises:
        CalibrationError: If there is no batch or all are skipped, a loss is no scalar or does not depend on the
            parameters, or a loss or gradient is not finite; the message names the batch and the parameter.
        UnsupportedModelError: If the group sets are of another model.
        ValueError: For an unknown mode or dtype.
    """
    check_gathering(mode, gradient_dtype)
    check_names(model, group_sets)
    terms = list(dict.fromkeys(terms))
    root = model if root is None else root
    sharding.reshard(root)
    needed = {t.statistic for t in terms if t.statistic is not None}
    gradients = bool(needed & {*ELEMENTWISE, *GROUPWISE})
    statistics = Statistics()
    losses: list[Tensor | None] = []
    accumulator = _Accumulator(getattr(torch, gradient_dtype), offload_gradients or mode == "elementwise")
    masked = [t for t in terms if t.statistic in GROUPWISE] if observable(group_sets) else []
    of_weights = [t for t in terms if t not in masked]
    collector = _GradientCollector(model, root, group_sets, of_weights, mode, accumulator, ranks) if gradients else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluation_mode(root))
        consumers = [part.module for s in group_sets for part in s.consumers]
        token_masks = stack.enter_context(TokenMasks(model, [*observed_modules(group_sets), *consumers]))
        masks = MaskCollector(model, group_sets, masked, ranks, token_masks) if masked else None
        observer = None
        sums = {s for name in (ACTIVATION if activations else needed & set(ACTIVATION)) for s in SUMS[name]}
        if sums:
            observer = stack.enter_context(ActivationObserver(model, group_sets, sorted(sums), token_masks))
        if collector is not None:
            stack.enter_context(collector)
        if masks is not None:
            stack.enter_context(masks)
        stack.enter_context(torch.set_grad_enabled(gradients))
        for number, batch in enumerate(_together(batches, ranks)):
            token_masks.start_batch(batch)
            loss = loss_fn(batch)
            counts = loss is not SKIPPED and not (gradients and loss is None)
            if not _everywhere(counts, ranks):
                statistics.skipped += 1
                _forget_batch(observer, masks)
                del loss
                continue
            if collector is not None:
                losses.append(_checked_loss(loss, number, ranks).detach())
                collector.start_batch()
                if masks is not None:
                    masks.start_backward()
                loss.backward()
                collector.end_batch(masks.end_batch() if masks is not None else [])
            else:
                losses.append(loss.detach().float().mean() if isinstance(loss, Tensor) else None)
            if observer is not None:
                observer.end_batch()
            statistics.batches += 1
            del loss
    if statistics.batches == 0:
        raise CalibrationError(_nothing_to_calibrate_on(statistics.skipped))
    statistics.loss = _mean_loss(losses, ranks)
    if collector is not None:
        collector.finish(statistics)
    if masks is not None:
        statistics.reduced.update(masks.finish())
    if observer is not None:
        statistics.activations = observer.finish()
        missing = sorted(set(observed_modules(group_sets)) - set(statistics.activations))
        if not _everywhere(not missing, ranks):
            named = missing[:5] or "modules that another process's batches went through"
            raise CalibrationError(f"No calibration batch went through {named}; their inputs cannot be measured.")
        if ranks is not None:
            statistics.reduce_activations(ranks)
        for name, activation in statistics.activations.items():
            if not all(bool(value.isfinite().all()) for value in activation.sums.values()):
                raise CalibrationError(f"The inputs of {name!r} are not finite in calibration. Nothing was pruned.")
    return statistics


def check_gathering(mode: str, gradient_dtype: str) -> None:
    """Refuse an unknown way to gather gradients.

    Raises:
        ValueError: If the mode is none of :data:`MODES`, or the dtype none of :data:`GRADIENT_DTYPES`.
    """
    if mode not in MODES:
        raise ValueError(f"Unknown statistics mode {mode!r}; expected one of {', '.join(MODES)}.")
    if gradient_dtype not in GRADIENT_DTYPES:
        raise ValueError(f"Unknown gradient_dtype {gradient_dtype!r}; expected one of {', '.join(GRADIENT_DTYPES)}.")


def _forget_batch(observer: ActivationObserver | None, masks: MaskCollector | None) -> None:
    """Drop what the forward pass of a skipped batch left."""
    if observer is not None:
        observer.skip_batch()
    if masks is not None:
        masks.skip_batch()


def _nothing_to_calibrate_on(skipped: int) -> str:
    if skipped == 0:
        return "The calibration dataloader gave no batch; expected at least one."
    return (
        f"All {skipped} calibration batches were skipped, because none had a loss for the model that is pruned; expected at"
        " least one. Let the training step return a loss (or call manual_backward with one that depends on the model) in"
        " calibration, where the module is in eval mode, or give other calibration batches."
    )


def _mean_loss(losses: Sequence[Tensor | None], ranks: Ranks | None) -> float | None:
    """The mean of the losses that there are, over all batches of all processes; ``None`` if there are none.

    Raises:
        CalibrationError: If one is not finite.
    """
    device = next((loss.device for loss in losses if loss is not None), torch.device("cpu"))
    nothing = torch.zeros((), device=device)
    # by batch, a line of losses and a line of how many there are: a process without any takes part all the same
    both = torch.stack(
        [
            torch.stack([nothing if loss is None else loss.float().reshape(()) for loss in losses]),
            torch.tensor([float(loss is not None) for loss in losses], device=device),
        ]
    )
    values, counts = (both if ranks is None else ranks.sum(both)).cpu()
    means = values / counts.clamp_min(1)
    if not bool(means.isfinite().all()):
        number = int((~means.isfinite()).nonzero()[0])
        raise CalibrationError(
            f"The loss of calibration batch {number} is {float(means[number])}; expected a finite number."
            " Nothing was pruned."
        )
    return float(values.sum() / counts.sum()) if bool(counts.any()) else None


def _everywhere(flag: bool, ranks: Ranks | None) -> bool:
    return flag if ranks is None else ranks.all(flag)


def _together(batches: Iterable[Any], ranks: Ranks | None) -> Iterator[Any]:
    """The batches, for as long as every process has one."""
    iterator = iter(batches)
    end = object()
    while True:
        batch = next(iterator, end)
        if not _everywhere(batch is not end, ranks):
            return
        yield batch


def _checked_loss(loss: Any, number: int, ranks: Ranks | None) -> Tensor:
    fine = isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad
    if _everywhere(fine, ranks):
        assert isinstance(loss, Tensor)
        return loss
    if fine:
        raise CalibrationError(f"Calibration batch {number} gave no usable loss on another process, which says why.")
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise CalibrationError(f"Calibration batch {number} gave no scalar loss; found {found}.")
    raise CalibrationError(
        f"The loss of calibration batch {number} does not depend on the weights to be pruned, so their gradients are"
        " unknown. Was it detached, or computed under no_grad?"
    )


class _Accumulator:
    """Sums tensors by key, in a dtype, where they are or in CPU memory.

    What comes from a CUDA device is copied into pinned memory by a stream of its own and added by the CPU a few tensors
    later, so that neither waits for the other.

    Args:
        dtype: The dtype of the sums.
        offload: Whether to keep them in CPU memory.
        depth: How many copies may be under way.
    """

    def __init__(self, dtype: torch.dtype, offload: bool, depth: int = 2) -> None:
        self.sums: dict[Any, Tensor] = {}
        self._dtype = dtype
        self._offload = offload
        self._depth = depth
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._copies: deque[tuple[Any, Tensor, torch.cuda.Event]] = deque()

    def add(self, key: Any, value: Tensor) -> None:
        """Add a tensor, which nothing may change afterwards."""
        if self._offload and value.is_cuda:
            self._copies.append((key, *self._copy(value)))
            if len(self._copies) > self._depth:
                self._add_copy()
        else:
            self._add(key, value.cpu() if self._offload else value)

    def _add(self, key: Any, value: Tensor) -> None:
        if key in self.sums:
            self.sums[key] += value
        elif value.dtype == self._dtype and value._base is None and value.is_contiguous():
            self.sums[key] = value
        else:
            self.sums[key] = value.to(self._dtype, copy=True)

    def _copy(self, value: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        if value.device not in self._streams:
            self._streams[value.device] = torch.cuda.Stream(value.device)
        stream = self._streams[value.device]
        stream.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(stream):
            pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            pinned.copy_(value, non_blocking=True)
            event = stream.record_event()
        # its memory may be given out again only when the copy is done
        value.record_stream(stream)
        return pinned, event

    def _add_copy(self) -> None:
        key, pinned, event = self._copies.popleft()
        event.synchronize()
        if key in self.sums:
            self.sums[key] += pinned
        else:
            # not the buffer itself: pinned memory is scarce, and goes back to be filled again
            self.sums[key] = torch.empty(pinned.shape, dtype=self._dtype).copy_(pinned)

    def finish(self) -> dict[Any, Tensor]:
        """The sums, once all copies have come in."""
        while self._copies:
            self._add_copy()
        return self.sums


class _GradientCollector:
    """Takes each parameter's gradient the moment it is ready, adds it to what the terms need, and frees it."""

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
        self._terms = [t for t in terms if t.statistic in ELEMENTWISE]
        self._groupwise = [t for t in terms if t.statistic in GROUPWISE]
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
        self._silenced: list[tuple[dict[int, Any], dict[int, Any]]] = []
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
            if not sharding.is_sharded(parameter):
                parameter.requires_grad_(id(parameter) in scored)
        self._silence_hooks(everything)
        for name, parameter in self._parameters.items():
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._hook(name)))
        for key, block in self._blocks.items():
            self._handles.append(watch_block(block, self._taker(key)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for hooks, before in self._silenced:
            hooks.update(before)
        for parameter, requires_grad in self._flags:
            parameter.requires_grad_(requires_grad)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient

    def _silence_hooks(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take out the hooks that others run once a gradient is there, such as an optimizer's step within backward."""
        for parameter in parameters:
            hooks = parameter._post_accumulate_grad_hooks
            if hooks and not sharding.is_sharded(parameter):
                self._silenced.append((hooks, dict(hooks)))
                hooks.clear()

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
                f" calibration batch {self._batches}; the loss does not depend on them."
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
        gradient = sharding.local(gradient)
        weight = sharding.local(parameter.detach())
        wanted: list[tuple[Callable[[Tensor], Tensor], int, Tensor]] = []
        masked: dict[int, Tensor] = {}
        accumulated = set()
        for term, dims in self._dims[name].items():
            assert term.statistic is not None
            if term.statistic in GROUPWISE:
                masked = {dim: weight.new_zeros(weight.shape[dim], dtype=torch.float32) for dim in dims}
                wanted += [(_identity, dim, line) for dim, line in masked.items()]
            elif self._mode == "elementwise" or term.statistic == "gradient":
                accumulated.add(term.statistic)
            else:
                lines = {dim: self._line(term, name, dim, weight) for dim in dims}
                if term.of_product is not None:
                    wanted += [(term.of_product, dim, line) for dim, line in lines.items()]
                    continue
                values = term.function(weight.float(), _PER_BATCH[term.statistic](gradient.float()))
                for dim, line in lines.items():
                    add_line(line, values, dim)
        self._batch_finite[name] = product_lines(weight, gradient, wanted).isfinite()
        for group_set, position in self._uses[name] if masked else ():
            part = group_set.slices[position]
            if self._groupwise[0].applies(group_set, part):
                self._add(self._mask_gradients, group_set.key, sharding.gather(part, masked[part.dim], parameter))
        for statistic in accumulated:
            value = gradient if statistic == "gradient" else _PER_BATCH[statistic](gradient.float())
            self._accumulator.add((statistic, name), value)

    def _line(self, term: Term, name: str, dim: int, weight: Tensor) -> Tensor:
        key = (term, name, dim)
        if key not in self._lines:
            self._lines[key] = weight.new_zeros(weight.shape[dim], dtype=torch.float32)
        return self._lines[key]

    def _take_mask_gradients(self) -> None:
        shared = sharding.any_sharded(self._parameters.values())
        if shared is not None and self._mask_gradients:
            keys = sorted(self._mask_gradients)
            whole = sharding.sum_over_shards(torch.cat([self._mask_gradients[k] for k in keys]), shared)
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
                        reduced = sharding.gather(part, line, self._parameters[name])
                        self._reduced[term, group_set.key, position] = reduced
        sums = self._accumulator.finish()
        for value in (*self._reduced.values(), *sums.values()):
            value /= self._batches
        statistics.reduced = self._reduced
        for (statistic, name), value in sums.items():
            statistics.elementwise.setdefault(statistic, {})[name] = value
