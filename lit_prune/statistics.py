"""Statistics gathered while calibration batches run: gradients, squared gradients and input activations.

Gradients can be kept in two ways. ``elementwise`` keeps a tensor of each parameter's shape in CPU memory. ``streaming``
reduces each batch to one number a group as soon as a parameter's gradient is ready, for every statistic that enters a
criterion linearly (see METHODS: the second-order term and the mean absolute gradient are linear, the mean gradient
under an absolute value is not and stays elementwise, on the parameter's own device). ``mask_gradient``, the derivative
of the loss by a mask of the groups, is a number a group and batch in either way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_prune import sharding
from lit_prune.blocks import hidden_input, hidden_output
from lit_prune.distributed import Ranks
from lit_prune.errors import CalibrationError
from lit_prune.groups import BLOCK, GroupSet, Slice, check_names

if TYPE_CHECKING:
    from lit_prune.importance import Term

ELEMENTWISE = ("gradient", "absolute_gradient", "squared_gradient")
GROUPWISE = ("mask_gradient",)
ACTIVATION = ("activation_mean_abs", "activation_l1", "activation_l2", "activation_variance")
STATISTICS = (*ELEMENTWISE, *GROUPWISE, *ACTIVATION)
MODES = ("streaming", "elementwise")

_PER_BATCH: dict[str, Callable[[Tensor], Tensor]] = {
    "gradient": lambda g: g,
    "absolute_gradient": torch.abs,
    "squared_gradient": torch.square,
}


@dataclass
class ActivationStatistics:
    """Running sums over the tokens that a projection saw, one number an input feature, in float64.

    Args:
        count: Number of tokens.
        sum: Sum of the values, shape ``(in_features,)``.
        sum_abs: Sum of the absolute values.
        sum_squares: Sum of the squares.
    """

    count: int
    sum: Tensor
    sum_abs: Tensor
    sum_squares: Tensor

    def update(self, inputs: Tensor) -> None:
        """Add tokens of shape ``(tokens, in_features)``."""
        inputs = inputs.float()
        self.count += inputs.shape[0]
        self.sum += inputs.sum(dim=0)
        self.sum_abs += inputs.abs().sum(dim=0)
        self.sum_squares += inputs.square().sum(dim=0)

    @property
    def mean(self) -> Tensor:
        """Mean of each feature."""
        return self.sum / self.count

    @property
    def mean_abs(self) -> Tensor:
        """Mean absolute value of each feature."""
        return self.sum_abs / self.count

    @property
    def l1(self) -> Tensor:
        """L1 norm of each feature over all tokens."""
        return self.sum_abs

    @property
    def l2(self) -> Tensor:
        """L2 norm of each feature over all tokens."""
        return self.sum_squares.sqrt()

    @property
    def variance(self) -> Tensor:
        """Population variance of each feature."""
        return (self.sum_squares / self.count - self.mean.square()).clamp_min(0)


@dataclass
class Statistics:
    """What a calibration collected.

    Args:
        batches: Number of calibration batches.
        tokens: Number of tokens that the first observed projection saw (0 without activation statistics).
        elementwise: By statistic and parameter, a float32 tensor of the parameter's shape, a mean over the batches; of
            a sharded parameter only the local shard.
        reduced: By term, group-set key and position of the slice in its set, a float32 tensor of shape ``(groups,)``,
            a mean over the batches; of a sharded parameter only what the local shard adds to it. Terms of whole groups
            (``mask_gradient``) are at position 0, and whole in every process.
        activations: By module, the statistics of its inputs.
        loss: Mean calibration loss, if losses were computed.
    """

    batches: int = 0
    elementwise: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    reduced: dict[tuple[Term, tuple[str, str], int], Tensor] = field(default_factory=dict)
    activations: dict[str, ActivationStatistics] = field(default_factory=dict)
    loss: float | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens seen, 0 without activation statistics."""
        return max((a.count for a in self.activations.values()), default=0)

    def reduce_activations(self, ranks: Ranks) -> None:
        """Add up, in place, what several processes observed on their own batches; the counts of tokens may differ."""
        for name in sorted(self.activations):
            activation = self.activations[name]
            activation.count = int(ranks.sum(torch.tensor(activation.count)))
            activation.sum = ranks.sum(activation.sum)
            activation.sum_abs = ranks.sum(activation.sum_abs)
            activation.sum_squares = ranks.sum(activation.sum_squares)

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


def attention_mask_of(batch: Any) -> Tensor | None:
    """The mask of real tokens in a batch, of shape ``(batch, tokens)``, if it is a mapping that has one."""
    if isinstance(batch, Mapping) or hasattr(batch, "get"):
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask
    return None


def collect_statistics(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    batches: Iterable[Any],
    loss_fn: Callable[[Any], Tensor | None],
    terms: Iterable[Term],
    *,
    mode: str = "streaming",
    activations: bool = False,
    root: nn.Module | None = None,
    ranks: Ranks | None = None,
) -> Statistics:
    """Run calibration batches and collect what the terms of a criterion need.

    The model is put in eval mode, only the parameters of the group sets require gradients meanwhile, and everything
    (modes, flags, gradients that were there, hooks) is put back, also when an error is raised.

    Args:
        model: The model that ``group_sets`` describe.
        group_sets: The group sets to collect for.
        batches: The calibration batches; each is one micro-batch of the mean over batches.
        loss_fn: Runs one batch through the model and returns its loss, a scalar. Without gradient statistics it may
            return ``None``.
        terms: The terms whose statistics are needed.
        mode: ``"streaming"`` or ``"elementwise"``.
        activations: Observe the inputs of the projections even if no term asks for it.
        root: The module that holds the model and computes the loss, if there is more to it than the model: its modes
            and gradients are guarded as well.
        ranks: The processes of a distributed run, each of which calls this with its own batches. A batch is then the
            batches of all of them together, its gradient their mean, as in training; calibration ends with the first
            process that has no more. Every process gets the same statistics, or an error.

    Raises:
        CalibrationError: If there is no batch, the loss is missing or does not depend on the parameters, or a loss or
            gradient is not finite; the message names the batch and the parameter.
        UnsupportedModelError: If the group sets are of another model.
        ValueError: For an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"Unknown statistics mode {mode!r}; expected one of {', '.join(MODES)}.")
    check_names(model, group_sets)
    terms = list(dict.fromkeys(terms))
    root = model if root is None else root
    sharding.reshard(root)
    needed = {t.statistic for t in terms if t.statistic is not None}
    gradients = bool(needed & {*ELEMENTWISE, *GROUPWISE})
    statistics = Statistics()
    losses: list[Tensor] = []
    collector = _GradientCollector(model, root, group_sets, terms, mode, ranks) if gradients else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluation_mode(root))
        observer = None
        if activations or needed & set(ACTIVATION):
            observer = stack.enter_context(_ActivationObserver(model, group_sets))
        if collector is not None:
            stack.enter_context(collector)
        stack.enter_context(torch.set_grad_enabled(gradients))
        for number, batch in enumerate(_together(batches, ranks)):
            if observer is not None:
                observer.mask = attention_mask_of(batch)
            loss = loss_fn(batch)
            if collector is not None:
                losses.append(_checked_loss(loss, number, ranks).detach())
                collector.start_batch()
                loss.backward()  # type: ignore[union-attr]
                collector.end_batch()
            elif isinstance(loss, Tensor):
                losses.append(loss.detach().float().mean())
            statistics.batches += 1
            del loss
    if statistics.batches == 0:
        raise CalibrationError("The calibration dataloader gave no batch; expected at least one.")
    if losses:
        stacked = torch.stack([loss.float() for loss in losses])
        stacked = (stacked if ranks is None else ranks.mean(stacked)).cpu()
        if not bool(stacked.isfinite().all()):
            number = int((~stacked.isfinite()).nonzero()[0])
            raise CalibrationError(
                f"The loss of calibration batch {number} is {float(stacked[number])}; expected a finite number."
                " Nothing was pruned."
            )
        statistics.loss = float(stacked.mean())
    if collector is not None:
        collector.finish(statistics)
    if observer is not None:
        statistics.activations = observer.statistics
        missing = sorted({s.module for g in group_sets for s in g.slices if s.observable} - set(observer.statistics))
        if not _everywhere(not missing, ranks):
            named = missing[:5] or "modules that another process's batches went through"
            raise CalibrationError(f"No calibration batch went through {named}; their inputs cannot be measured.")
        if ranks is not None:
            statistics.reduce_activations(ranks)
        for name, activation in observer.statistics.items():
            if not bool(activation.sum_squares.isfinite().all()):
                raise CalibrationError(f"The inputs of {name!r} are not finite in calibration. Nothing was pruned.")
    return statistics


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


def _checked_loss(loss: Tensor | None, number: int, ranks: Ranks | None) -> Tensor:
    fine = isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad
    if _everywhere(fine, ranks):
        assert loss is not None
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


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off; modules that checkpoint activations keep the flag that makes them do so."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, training in modes:
            module.training = training and bool(getattr(module, "gradient_checkpointing", False))
        yield
    finally:
        for module, training in modes:
            module.training = training


class _ActivationObserver:
    """Forward hooks that keep running sums of every projection's input."""

    def __init__(self, model: nn.Module, group_sets: Sequence[GroupSet]) -> None:
        self._modules = {s.module: model.get_submodule(s.module) for g in group_sets for s in g.slices if s.observable}
        self._handles: list[Any] = []
        self.statistics: dict[str, ActivationStatistics] = {}
        self.mask: Tensor | None = None

    def __enter__(self) -> _ActivationObserver:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        @torch.no_grad()
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            inputs = args[0].detach()
            inputs = inputs.reshape(-1, inputs.shape[-1])
            # some models flatten batch and tokens before a projection
            if self.mask is not None and self.mask.numel() == len(inputs):
                inputs = inputs[self.mask.flatten().bool()]
            if name not in self.statistics:
                zeros = torch.zeros(inputs.shape[-1], dtype=torch.float64, device=inputs.device)
                self.statistics[name] = ActivationStatistics(0, zeros, zeros.clone(), zeros.clone())
            self.statistics[name].update(inputs)

        return hook


class _GradientCollector:
    """Takes each parameter's gradient the moment it is ready, adds it to what the terms need, and frees it."""

    def __init__(
        self,
        model: nn.Module,
        root: nn.Module,
        group_sets: Sequence[GroupSet],
        terms: Sequence[Term],
        mode: str,
        ranks: Ranks | None,
    ) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
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
        frozen = [name for name, p in self._parameters.items() if not p.requires_grad]
        if frozen:
            raise CalibrationError(
                f"{len(frozen)} parameters to be scored by their gradients are frozen (requires_grad=False), the first"
                f" {frozen[:3]}. Unfreeze them, or use a criterion that needs no gradient, such as importance='wanda'."
            )
        self._elementwise: dict[str, dict[str, Tensor]] = {}
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
        everything = list(self._root.parameters())
        self._flags = [(p, p.requires_grad) for p in everything]
        self._gradients = [(p, p.grad) for p in everything]
        for parameter in everything:
            parameter.grad = None
            # FSDP2 fixes at its first forward which parameters it will ever reduce gradients of: leave it its flags
            if not sharding.is_sharded(parameter):
                parameter.requires_grad_(id(parameter) in scored)
        for name, parameter in self._parameters.items():
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._hook(name)))
        for key, block in self._blocks.items():
            self._handles.append(block.register_forward_hook(self._block_hook(key), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter, requires_grad in self._flags:
            parameter.requires_grad_(requires_grad)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient

    def start_batch(self) -> None:
        self._batch_finite = {}
        self._next = 0

    def end_batch(self) -> None:
        seen = self._waiting.keys() | self._batch_finite.keys()
        missing = [name for name in self._parameters if name not in seen]
        for name in missing if self._order else ():
            self._waiting[name] = torch.zeros_like(self._parameters[name])
        self._average_waiting()
        if not _everywhere(not missing, self._ranks):
            raise CalibrationError(
                f"No gradient reached {missing[:3] or 'some parameters on another process'} ({len(missing)} parameters) in"
                f" calibration batch {self._batches}; the loss does not depend on them."
            )
        self._take_mask_gradients()
        # one flag a parameter, read only after the last batch: no synchronisation with the device per batch
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

    def _block_hook(self, key: tuple[str, str]) -> Callable[..., None]:
        """Take the derivative of the loss by a mask of what a block adds to its input, which needs no parameter."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            states = hidden_output(output)
            before, after = hidden_input(args, kwargs).detach(), states.detach()

            def take(gradient: Tensor) -> None:
                derivative = (gradient.float() * (after.float() - before.float())).sum()
                self._add(self._block_gradients, key, derivative.view(1))

            if torch.is_grad_enabled():
                # what has no scored weight before it would get no gradient
                states.requires_grad_().register_hook(take)

        return hook

    def _average_waiting(self) -> None:
        assert self._ranks is not None or not self._order
        while self._next < len(self._order) and self._order[self._next] in self._waiting:
            name = self._order[self._next]
            self._take(name, self._ranks.mean(self._waiting.pop(name)))  # type: ignore[union-attr]
            self._next += 1

    def _take(self, name: str, gradient: Tensor) -> None:
        parameter = self._parameters[name]
        gradient = sharding.local(gradient)
        self._batch_finite[name] = gradient.sum(dtype=torch.float32).isfinite()
        gradient = gradient.float()
        weight = sharding.local(parameter.detach()).float()
        if self._groupwise:
            product = weight * gradient
            for group_set, position in self._uses[name]:
                part = group_set.slices[position]
                if self._groupwise[0].applies(group_set, part):
                    self._add(self._mask_gradients, group_set.key, sharding.reduce(part, product, parameter))
        elementwise = set()
        for term in self._terms:
            assert term.statistic is not None
            if self._mode == "elementwise" or term.statistic == "gradient":
                elementwise.add(term.statistic)
                continue
            value = term.function(weight, _PER_BATCH[term.statistic](gradient))
            for group_set, position in self._uses[name]:
                part = group_set.slices[position]
                if term.applies(group_set, part):
                    reduced = sharding.reduce(part, value, parameter)
                    self._add(self._reduced, (term, group_set.key, position), reduced)
        for statistic in elementwise:
            value = _PER_BATCH[statistic](gradient)
            if self._mode == "elementwise":
                value = value.cpu()
            self._add(self._elementwise.setdefault(statistic, {}), name, value)

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
        finite = torch.stack(self._finite)
        finite = (finite if self._ranks is None else self._ranks.minimum(finite.int()).bool()).cpu()
        if not bool(finite.all()):
            batch, position = (int(i) for i in (~finite).nonzero()[0])
            raise CalibrationError(
                f"The gradient of {list(self._parameters)[position]!r} is not finite in calibration batch {batch}."
                " Nothing was pruned."
            )
        for value in (*self._reduced.values(), *(v for s in self._elementwise.values() for v in s.values())):
            value /= self._batches
        statistics.reduced = self._reduced
        statistics.elementwise = self._elementwise
