"""What a model gives on the calibration batches, kept so that a pruned one can be compared with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.architectures.layers import before_layer
from lit_prune.calibration.divergence import distillation_loss, gives_classes, output_divergence
from lit_prune.calibration.evaluation import evaluation_mode, is_observed, unobserved
from lit_prune.calibration.module_checks import relative_difference, tolerance
from lit_prune.calibration.precision import accumulation_dtype
from lit_prune.calibration.random_state import random_state, random_state_kept
from lit_prune.calibration.statistics import SKIPPED
from lit_prune.calibration.token_masks import TokenMasks, output_mask
from lit_prune.distributed.ranks import Ranks
from lit_prune.errors import UnsupportedModelError
from lit_prune.repair.passes import Data, sample
from lit_prune.torch_internals import tree_leaves

LOGITS = "logits"
# positions whose logits over a vocabulary are in memory at once
CHUNK = 1024
# positions whose logits are looked at to know whether they are what the output embeddings gave
_ROWS = 16


class OutputReader:
    """Reads what a model gives: what its output embeddings read, where it has any, or else its output.

    That the logits are what the output embeddings make of it, or a multiple of that, is looked at in the first call of the
    model; where they are something else (they may be capped), the logits themselves are read.

    Args:
        model: The model.

    Attributes:
        head: Path of the output embeddings, or ``None``.
        inputs: Some values of every tensor that the model was called with first since the last :meth:`start_batch`, or of every
            tensor in the batch where only parts of the model are called.
        calls: What the forward passes gave since the last :meth:`start_batch`: outputs of shape ``(..., features)``, each with a
            bool mask of its real positions, or ``None`` if all are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.head = _output_embeddings(model)
        self._masks: TokenMasks | None = None
        self.calls: list[tuple[Tensor, Tensor | None]] = []
        self.inputs: list[Tensor] = []
        self._called = False
        # what the output embeddings gave in this call of the model; None once it is known what becomes of it
        self._made: list[_Rows] | None = []
        self._scale, self._reads_logits = 1.0, False

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Read what is run within."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._model.register_forward_pre_hook(self._before_model, with_kwargs=True).remove)
            if self.head is not None:
                self._masks = stack.enter_context(TokenMasks(self._model, [self.head]))
                head = self._model.get_submodule(self.head)
                stack.callback(before_layer(head, self._before_head).remove)
                stack.callback(head.register_forward_hook(self._after_head).remove)
            stack.callback(self._model.register_forward_hook(self._after_model, with_kwargs=True).remove)
            yield

    def start_batch(self, batch: Any) -> None:
        """Forget the batch before."""
        self.calls.clear()
        self.inputs, self._called = _samples(batch), False
        if self._made:
            self._made.clear()
        if self._masks is not None:
            self._masks.start_batch(batch)

    def _before_model(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_observed():
            return
        if self._made:
            self._made.clear()
        # what later calls are given may come from earlier outputs, which pruning changes
        if not self._called:
            self.inputs, self._called = _samples((args, kwargs)), True

    def _before_head(self, _: nn.Module, inputs: Tensor) -> None:
        if is_observed() and not self._reads_logits:
            assert self._masks is not None
            self.calls.append((inputs, self._masks.of(inputs)))

    def _after_head(self, _: nn.Module, __: Any, output: Tensor) -> None:
        if is_observed() and self._made is not None:
            self._made.append(_Rows.of(output))

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not is_observed():
            return
        if self.head is not None and self._made:
            self._look_behind_head(self._made, _tensor_in(output))
        if self.head is None or self._reads_logits:
            found = _main_tensor(output, type(module).__name__)
            self.calls.append((found, output_mask(module, args, kwargs, found.shape[:-1])))

    def _look_behind_head(self, made: Sequence[_Rows], logits: Tensor | None) -> None:
        """Find out what a model makes of the output of its output embeddings, where both can be compared."""
        self._made = None
        if len(made) > 1 or logits is None or logits.shape != made[0].shape:
            return
        scale = made[0].scale_of(logits)
        if scale is None:
            self._reads_logits = True
            self.calls.clear()
        else:
            self._scale = scale

    def difference(self, given: Tensor, dense: Tensor, mask: Tensor | None) -> Tensor:
        """How far one output is from the dense one, a scalar with gradients for ``given``.

        The mean over positions of the Kullback-Leibler divergence, in nats, where the outputs are what output embeddings read
        or logits of at least two classes or labels; else the squared error over the mean square of the dense outputs.
        """
        if self.head is None and self._gives_logits(dense):
            return output_divergence(self._model, given, dense, mask=mask)
        given, dense = (x if mask is None else x[mask] for x in (given, dense))
        given, dense = given.reshape(-1, given.shape[-1]), dense.reshape(-1, dense.shape[-1])
        if self.head is not None:
            return _Divergence.apply(given, dense, self._logits)
        given, dense = given.to(accumulation_dtype(given.dtype)), dense.to(accumulation_dtype(dense.dtype))
        return (given - dense).square().mean() / dense.square().mean().clamp_min(torch.finfo(dense.dtype).tiny)

    def _gives_logits(self, outputs: Tensor) -> bool:
        return hasattr(self._model, "num_labels") and gives_classes(self._model, outputs)

    def _logits(self, states: Tensor) -> Tensor:
        """The logits of what was read."""
        if self._reads_logits:
            return states
        assert self.head is not None
        head: Any = self._model.get_submodule(self.head)
        with unobserved():
            # the autocast of the step is over, which may have cast the states to another dtype than that of the weights
            return self._scale * head(states.to(head.weight.dtype))


@dataclass(frozen=True)
class _Rows:
    """The features of some positions of an output.

    Args:
        shape: Shape of the whole output.
        values: Shape ``(positions, features)``, in double precision.
        dtype: What it was in.
    """

    shape: torch.Size
    values: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, output: Tensor) -> _Rows:
        """Copy the rows of an output, shape ``(..., features)``."""
        rows = output.detach().reshape(-1, output.shape[-1])
        return cls(
            output.shape, rows[:: max(1, -(-len(rows) // _ROWS))].to("cpu", torch.float64, copy=True), output.dtype
        )

    def scale_of(self, output: Tensor) -> float | None:
        """The number that an output of the same shape is this one times, or ``None`` if there is none."""
        other = _Rows.of(output)
        finite = self.values.isfinite() & other.values.isfinite()
        mine, others = self.values[finite], other.values[finite]
        scale = float((mine * others).sum() / mine.square().sum().clamp_min(torch.finfo(mine.dtype).tiny))
        # a product is rounded once
        within = max(1e-5, torch.finfo(self.dtype).eps, torch.finfo(other.dtype).eps)
        return scale if relative_difference(scale * self.values, other.values) <= within else None


class _Divergence(torch.autograd.Function):
    """The divergence of the logits that a function makes, with the logits of some positions in memory at a time."""

    @staticmethod
    def forward(context: Any, given: Tensor, dense: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
        context.dtype, wide = given.dtype, accumulation_dtype(given.dtype)
        total = torch.zeros((), dtype=torch.float64, device=given.device)
        gradients = []
        for student, teacher in zip(given.detach().split(CHUNK), dense.split(CHUNK), strict=True):
            # so that its gradient is not in 16 bits
            student = student.to(wide).requires_grad_()
            with torch.no_grad():
                wanted = logits(teacher).float()
            with torch.enable_grad():
                loss = distillation_loss(logits(student).float(), wanted) * len(student)
                gradients.append(torch.autograd.grad(loss, student)[0])
            total += loss.detach()
        context.save_for_backward(torch.cat(gradients) / len(given))
        return (total / len(given)).to(wide)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (saved,) = context.saved_tensors
        return (saved * gradients[0]).to(context.dtype), None, None


@dataclass(frozen=True)
class DenseBatch:
    """What the dense model gave on a batch.

    Args:
        outputs: Its outputs, by call, in CPU memory; none if the batch was skipped, by any process.
        inputs: What :class:`OutputReader` keeps of what the model was called with.
        rewind: Puts the global random numbers where they were after the batch.
    """

    outputs: list[Tensor]
    inputs: list[Tensor]
    rewind: Callable[[], None]

    def is_like(self, calls: Sequence[tuple[Tensor, Any]], inputs: Sequence[Tensor]) -> bool:
        """Whether a batch is this one, by the shapes of what the model gives and the values of what it is called with."""
        shapes = [output.shape for output, _ in calls] == [output.shape for output in self.outputs]
        return shapes and len(inputs) == len(self.inputs) and all(map(_is_same, inputs, self.inputs))


@dataclass(frozen=True)
class DenseOutputs:
    """What the dense model gave on the calibration batches.

    Args:
        batches: By batch; as many as the process with the fewest has.
        rewind: Puts the global random numbers where they were before the first batch was asked for.
        reader: What read them; it reads the same of the model when it is pruned.
    """

    batches: list[DenseBatch]
    rewind: Callable[[], None]
    reader: OutputReader


def record_outputs(
    model: nn.Module, data: Data, root: nn.Module | None = None, ranks: Ranks | None = None
) -> DenseOutputs:
    """Run the batches and keep what the model gives.

    Args:
        model: The model.
        data: Gives a context with the batches and a function that runs one.
        root: The module that holds the model, if the function runs more than the model.
        ranks: The processes of a distributed run, each with batches of its own.

    Raises:
        UnsupportedModelError: If the model gives no tensor of floating point numbers on any batch, or is never called itself.
    """
    reader = OutputReader(model)
    kept: list[DenseBatch] = []
    rewind = random_state()
    with random_state_kept(), data() as (batches, run), reader.reading(), torch.no_grad():
        with evaluation_mode(model if root is None else root):
            for batch in batches:
                reader.start_batch(batch)
                counts = run(batch) is not SKIPPED
                outputs = [output.detach().cpu() for output, _ in reader.calls] if counts else []
                kept.append(DenseBatch(outputs, reader.inputs, random_state()))
    if ranks is not None:
        counted = ranks.gather([bool(batch.outputs) for batch in kept])
        everywhere = [all(flags) for flags in zip(*counted, strict=False)]
        kept = [b if counts else replace(b, outputs=[]) for b, counts in zip(kept, everywhere, strict=False)]
    if not any(batch.outputs for batch in kept):
        called = type(model).__name__ + ("" if reader.head is None else f" and its output embeddings, {reader.head},")
        raise UnsupportedModelError(
            f"Of {len(kept)} calibration batches none gave an output to compare with the dense one: expected steps that call"
            f" {called} and count, found none."
        )
    return DenseOutputs(kept, rewind, reader)


def _samples(values: Any) -> list[Tensor]:
    """Some values of every tensor in a nesting, in CPU memory."""
    leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return [sample(leaf).cpu() for leaf in leaves if leaf.layout == torch.strided and not leaf.is_nested]


def _is_same(found: Tensor, known: Tensor) -> bool:
    if not known.is_floating_point():
        return torch.equal(found, known)
    return relative_difference(found, known) <= tolerance(known.dtype)


def _output_embeddings(model: nn.Module) -> str | None:
    """Path of the projection to the vocabulary, if the model names one."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if not isinstance(head, nn.Linear):
        return None
    return next((name for name, module in model.named_modules() if module is head), None)


def _main_tensor(output: Any, name: str) -> Tensor:
    """What :func:`_tensor_in` finds in an output.

    Raises:
        UnsupportedModelError: If there is none.
    """
    found = _tensor_in(output)
    if found is None:
        raise UnsupportedModelError(
            f"{name} gave a {type(output).__name__} without a tensor of floating point numbers."
        )
    return found


def _tensor_in(output: Any) -> Tensor | None:
    """The logits of an output, or else its first tensor of floating point numbers, shape ``(..., features)``.

    One of a single dimension, a number for every sample, has one feature; it counts where there is no other.
    """
    if isinstance(output, Mapping):
        values: list[Any] = [output[LOGITS]] if output.get(LOGITS) is not None else list(output.values())
    else:
        values = list(output) if isinstance(output, Sequence) else [output]
    tensors = [v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.dim()]
    if not tensors:
        return None
    found = next((t for t in tensors if t.dim() > 1), tensors[0])
    return found if found.dim() > 1 else found.unsqueeze(-1)
