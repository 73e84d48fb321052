"""Gates on the groups of a model: what a removed group adds is taken away, and derivatives by all gates are measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from lit_prune.architectures.features import feature_dim, input_features, is_convolution, output_dim
from lit_prune.architectures.layers import before_layer, hidden_input, hidden_output
from lit_prune.calibration.mask_gradients import observable
from lit_prune.calibration.precision import accumulation_dtype
from lit_prune.calibration.token_masks import TokenMasks, recomputing
from lit_prune.errors import CalibrationError, UnsupportedModelError
from lit_prune.groups import BLOCK, GroupSet

Key = tuple[str, str]


class _Gated(torch.autograd.Function):
    """Inputs with features as the last dimension, of which the removed ones are as the others predict them, or 0.

    The derivative by a gate is that of the feature and the gradient that comes back for it, less what the others would
    make up for: for a kept feature as if the others were refitted without it.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, derivative: Tensor, keep: Tensor, predictor: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, keep, predictor)
        ctx.samples = len(derivative)
        kept = inputs * keep
        if predictor is None:
            return kept
        return torch.where(keep, inputs, kept @ predictor.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        inputs, keep, predictor = ctx.saved_tensors
        whole = gradient * keep
        left = inputs
        if predictor is not None:
            left = inputs - (inputs * keep) @ predictor.T
            whole = whole + (gradient * ~keep) @ predictor
        # in float16 the product of an input and its gradient may be below the smallest number there is
        wide = accumulation_dtype(inputs.dtype)
        product = left.to(wide) * torch.where(keep, whole, gradient).to(wide)
        return whole * keep, product.reshape(ctx.samples, -1, inputs.shape[-1]).sum(dim=1), None, None


class Gates:
    """Gates on what the consumers of all groups read, and on what whole blocks add; a context manager, which sets the hooks.

    Nothing happens but within :meth:`open`. A sample is an entry along the batch's dimension; where consumers do not agree
    on how many there are, the whole batch is one.

    Args:
        model: The model.
        group_sets: Its group sets.

    Attributes:
        parts: By the name of every layer that reads groups, the group sets that it reads, each with the features of every group,
            shape ``(groups, width)``.
        predictors: By the name of a linear layer that reads groups, a matrix of shape ``(features, features)`` that predicts
            each feature of its inputs from those of other groups that are kept; empty to take removed ones for 0.

    Raises:
        UnsupportedModelError: If there are groups whose consumers cannot be observed.
    """

    def __init__(self, model: nn.Module, group_sets: Sequence[GroupSet]) -> None:
        if not observable(group_sets):
            hidden = [s.name for s in group_sets if not observable([s])]
            raise UnsupportedModelError(
                f"Gates act on what layers read, and what reads the groups of {hidden[:3]} cannot be observed from outside"
                " (fused experts, nn.MultiheadAttention, whole experts). Rank them by a criterion, without gates."
            )
        self._model, self._group_sets = model, group_sets
        self.parts: dict[str, list[tuple[GroupSet, Tensor]]] = {}
        for group_set in group_sets:
            for part in group_set.consumers:
                module = model.get_submodule(part.module)
                features = input_features(module, part.index, part.dim)
                self.parts.setdefault(part.module, []).append((group_set, features))
        self._described = all(s.block for s in group_sets)
        self._token_masks = TokenMasks(model, list(self.parts))
        self.predictors: dict[str, Tensor] = {}
        self._kept: dict[Key, Tensor] = {s.key: torch.ones(s.size, dtype=torch.bool) for s in group_sets}
        self._keep: dict[str, Tensor] = {}
        self._seen: dict[str, list[Tensor]] = {}
        self._batch_size = 0
        self._open = False
        # what gates are changed by, by the name of the layer and of the block
        self._changes: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Gates:
        for group_set in self._group_sets:
            if group_set.kind == BLOCK:
                block = self._model.get_submodule(group_set.name)
                self._handles.append(block.register_forward_hook(self._gate_block(group_set), with_kwargs=True))
        for name in self.parts:
            module = self._model.get_submodule(name)
            self._handles.append(before_layer(module, self._gate_inputs(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def is_open(self) -> bool:
        """Whether forward passes go through the gates now."""
        return self._open

    @property
    def linear_layers(self) -> dict[str, int]:
        """The layers whose inputs can be predicted from one another, by name, and how many features they read."""
        linear = [name for name in self.parts if not is_convolution(self._model.get_submodule(name))]
        return {name: self._features(name) for name in linear}

    def set(self, kept: Sequence[Tensor]) -> None:
        """Let through the groups that are kept.

        Args:
            kept: By group set a bool tensor of shape ``(groups,)``.
        """
        self._kept = {s.key: k for s, k in zip(self._group_sets, kept, strict=True)}
        self._keep.clear()

    @contextlib.contextmanager
    def open(self, batch: object = None) -> Iterator[None]:
        """Let forward passes within go through the gates; the backward pass belongs within as well.

        Activation checkpointing runs parts of the forward pass in it again. What passes before have left is dropped.

        Args:
            batch: What the passes are of; tells which of the dimensions is the batch's, with what the model is given.
        """
        self.forget()
        with self._token_masks:
            self._token_masks.start_batch(batch)
            before, self._open = self._open, True
            try:
                yield
            finally:
                self._open = before

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Let forward passes within be those of the whole model."""
        before, self._open = self._open, False
        try:
            yield
        finally:
            self._open = before

    @contextlib.contextmanager
    def changed_by(self, changes: Sequence[Tensor]) -> Iterator[None]:
        """Within :meth:`open`, with all gates open, change each of them a little, and measure derivatives there.

        Args:
            changes: By group set what is added to its gates, shape ``(groups,)``.
        """
        by_key = {s.key: change for s, change in zip(self._group_sets, changes, strict=True)}
        for name, parts in self.parts.items():
            features = self._features(name)
            line = self._changes[name] = torch.zeros(features, dtype=torch.float32)
            for group_set, index in parts:
                line[index.flatten()] = by_key[group_set.key].to(line).repeat_interleave(index.shape[1])
        for group_set in self._group_sets:
            if group_set.kind == BLOCK:
                self._changes[group_set.name] = by_key[group_set.key].float()
        try:
            yield
        finally:
            self._changes.clear()

    def _features(self, name: str) -> int:
        module = self._model.get_submodule(name)
        weight: Tensor = module.weight  # type: ignore[assignment]
        return module.in_channels if is_convolution(module) else weight.shape[1 - output_dim(module)]  # type: ignore[return-value]

    def mask_of(self, name: str, features: int, device: torch.device) -> Tensor:
        """Which features of a layer's input are let through, bool tensor of shape ``(features,)``."""
        mask = self._keep.get(name)
        if mask is None or mask.device != device:
            mask = torch.ones(features, dtype=torch.bool)
            for group_set, index in self.parts[name]:
                mask[index[~self._kept[group_set.key]].flatten()] = False
            mask = self._keep[name] = mask.to(device)
        return mask

    def _gate_inputs(self, name: str) -> Callable[[nn.Module, Tensor], Tensor | None]:
        def hook(module: nn.Module, inputs: Tensor) -> Tensor | None:
            if not self._open:
                return None
            dim = feature_dim(module)
            keep = self.mask_of(name, inputs.shape[dim], inputs.device)
            batch_dim = self._token_masks.batch_dim if dim == -1 and inputs.dim() > 2 else 0
            last = inputs.movedim(dim, -1).movedim(batch_dim, 0)
            samples = self._samples_in(last, inputs.dim() > -dim)
            derivative = self._note(name, samples, inputs.shape[dim], inputs)
            samples = len(derivative)
            predictor = self.predictors.get(name)
            if self._changes:
                left = last if predictor is None else last - last @ predictor.to(last).T
                line = self._changes[name].to(last) + derivative.to(last)
                # a sample has its own line, or all rows have the same
                line = line.view(*line.shape[:1], *[1] * (last.dim() - 2), -1) if samples > 1 else line[0]
                return (last + line * left).movedim(0, batch_dim).movedim(-1, dim)
            gated = _Gated.apply(last, derivative, keep, None if predictor is None else predictor.to(inputs))
            return gated.movedim(0, batch_dim).movedim(-1, dim)

        return hook

    def _gate_block(self, group_set: GroupSet) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not self._open:
                return None
            states, before = hidden_output(output), hidden_input(args, kwargs)
            batch_dim = self._token_masks.batch_dim if states.dim() > 2 else 0
            added = (states - before).movedim(batch_dim, 0)
            # the whole of what the block adds is one feature
            line = added.reshape(*added.shape[:1], -1)
            samples = len(line) if states.dim() > 2 else 1
            derivative = self._note(group_set.name, samples, 1, states)
            if self._changes:
                line = (1 + self._changes[group_set.name].to(line) + derivative.to(line)) * line
                hidden = before + line.reshape(added.shape).movedim(0, batch_dim)
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
            kept = bool(self._kept[group_set.key])
            gated = _GatedBlock.apply(line, derivative, kept).reshape(added.shape).movedim(0, batch_dim)
            hidden = before + gated
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    def _note(self, name: str, samples: int, features: int, like: Tensor) -> Tensor:
        """A leaf that the backward pass leaves the derivatives in, as its gradient.

        What activation checkpointing computes anew has the leaf of the first time, when gradients may have been off.
        """
        if recomputing() and name in self._seen:
            return self._seen[name][-1]
        dtype = accumulation_dtype(like.dtype)
        derivative = torch.zeros(samples, features, dtype=dtype, device=like.device, requires_grad=True)
        self._seen.setdefault(name, []).append(derivative)
        return derivative

    def _samples_in(self, inputs: Tensor, whole: bool) -> int:
        """Number of samples in what a consumer reads; 1 where its rows may be tokens of several samples."""
        if inputs.dim() > 2 and whole:
            self._batch_size = len(inputs)
            return self._batch_size
        return len(inputs) if not self._described or len(inputs) == self._batch_size else 1

    def forget(self) -> None:
        """Drop what forward and backward passes have left."""
        self._seen.clear()
        self._batch_size = 0

    @torch.no_grad()
    def take(self, scale: float = 1.0) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """Take what the backward pass of a batch has left.

        Args:
            scale: What the loss, a mean over the batch's samples, was multiplied by.

        Returns:
            By group set the sum over the samples of the derivatives of each one's loss by every gate, the sum of their
            squares, both of shape ``(groups,)`` (float64), and the number of samples: 0, as the sums are, where the backward
            pass reached no gate of the set (a layer that was skipped).
        """
        found: dict[Key, list[Tensor]] = {s.key: [] for s in self._group_sets}
        gradients = {name: [d.grad for d in leaves if d.grad is not None] for name, leaves in self._seen.items()}
        for group_set in self._group_sets:
            if group_set.kind == BLOCK:
                found[group_set.key] += gradients.get(group_set.name, [])
        for name, parts in self.parts.items():
            for group_set, index in parts:
                found[group_set.key] += [g[:, index.to(g.device)].sum(dim=2) for g in gradients.get(name, [])]
        self.forget()
        counts = {len(d) for derivatives in found.values() for d in derivatives}
        samples = counts.pop() if len(counts) == 1 else 1
        totals = [
            torch.stack([d if samples > 1 else d.sum(dim=0, keepdim=True) for d in found[s.key]]).sum(dim=0).double()
            * (samples / scale)
            if found[s.key]
            else torch.zeros(samples, s.size, dtype=torch.float64)
            for s in self._group_sets
        ]
        numbers = [samples if found[s.key] else 0 for s in self._group_sets]
        return [t.sum(dim=0).cpu() for t in totals], [t.square().sum(dim=0).cpu() for t in totals], numbers


class _GatedBlock(torch.autograd.Function):
    """What a block adds, shape ``(samples, features)``, or nothing; the derivative by its gate is measured in any case."""

    @staticmethod
    def forward(ctx: Any, added: Tensor, derivative: Tensor, kept: bool) -> Tensor:
        ctx.save_for_backward(added)
        ctx.kept, ctx.samples = kept, len(derivative)
        return added.view_as(added) if kept else torch.zeros_like(added)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (added,) = ctx.saved_tensors
        wide = accumulation_dtype(added.dtype)
        product = (added.to(wide) * gradient.to(wide)).reshape(ctx.samples, -1).sum(dim=1, keepdim=True)
        return gradient if ctx.kept else torch.zeros_like(gradient), product, None


def unreached(names: Iterable[str]) -> CalibrationError:
    """The error of a loss that does not depend on gates of some names."""
    return CalibrationError(
        f"The loss does not depend on the gates of {list(names)[:3]}: the training step or loss function did not run them, or"
        " cut the gradient off (no_grad, detach). If they run within torch.utils.checkpoint, give it use_reentrant=False."
    )


def again_and_again(batches: Iterable[Any]) -> Iterable[Any]:
    """The batches, gone through again and again."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise CalibrationError("There is no batch to learn gates on.")
