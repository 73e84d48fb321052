"""Derivatives of the loss by a mask of the groups, sample by sample, from activations alone: no weight needs a gradient.

A mask, 1 for a group that is there and 0 for one that is not, scales what the consumer reads of the group. Its derivative
is the sum, over a sample's tokens and the group's features, of activation times gradient, which a backward pass through
activations gives for every sample of a batch at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from lit_prune.architectures.features import feature_dim, input_features
from lit_prune.architectures.layers import before_layer, hidden_input, hidden_output
from lit_prune.calibration.evaluation import is_observed
from lit_prune.calibration.precision import accumulation_dtype, loss_scale
from lit_prune.calibration.terms import Term
from lit_prune.calibration.token_masks import TokenMasks
from lit_prune.distributed.ranks import Ranks
from lit_prune.errors import CalibrationError
from lit_prune.groups import BLOCK, GroupSet, Slice

Key = tuple[str, str]


def observable(group_sets: Sequence[GroupSet]) -> bool:
    """Whether all groups have consumers whose inputs can be seen, so that masks of them can be put there."""
    return all(s.kind == BLOCK or (s.consumers and len(s.repairable) == len(s.consumers)) for s in group_sets)


class _Masked(torch.autograd.Function):
    """The identity, as if a mask of ones of shape ``(samples, features)`` scaled the features."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, mask: Tensor, batch_dim: int, feature_dim: int) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.samples, ctx.batch_dim, ctx.feature_dim = len(mask), batch_dim, feature_dim
        return inputs.view_as(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (inputs,) = ctx.saved_tensors
        # in float16 the product of an input and its gradient may be below the smallest number there is
        wide = accumulation_dtype(inputs.dtype)
        product = inputs.to(wide) * gradient.to(wide)
        if ctx.feature_dim == -1:
            product = product.movedim(ctx.batch_dim, 0).reshape(ctx.samples, -1, inputs.shape[-1])
            return gradient, product.sum(dim=1), None, None
        # channels of a convolution: its spatial positions lie behind them
        channels = inputs.dim() + ctx.feature_dim
        product = product.flatten(channels + 1).sum(dim=-1)
        return gradient, product.reshape(ctx.samples, inputs.shape[channels]), None, None


def watch_block(
    block: nn.Module, take: Callable[[Tensor], None], token_masks: TokenMasks | None = None
) -> RemovableHandle:
    """Take the derivatives of the loss by a mask of what a block adds to its input, shape ``(samples,)``, at each backward."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not is_observed():
            return
        states = hidden_output(output)
        before, after = hidden_input(args, kwargs).detach(), states.detach()
        batch_dim = 0 if token_masks is None else token_masks.batch_dim
        scale = loss_scale()

        def derive(gradient: Tensor) -> None:
            product = gradient.float() / scale * (after.float() - before.float())
            take(product.movedim(batch_dim, 0).flatten(1).sum(dim=1) if product.dim() > 2 else product.sum().view(1))

        if torch.is_grad_enabled():
            # what has nothing scored before it would get no gradient
            states.requires_grad_().register_hook(derive)

    return block.register_forward_hook(hook, with_kwargs=True)


class MaskCollector:
    """Puts masks on the groups of a model and adds up what terms of whole groups make of their derivatives.

    A sample is an entry along the batch's dimension of what the consumers read, an image for convolutions; where they do not
    agree on how many there are (a model that flattens batch and tokens in places), the whole batch is one. A group that is
    read in several places has one mask in all of them: its derivative is the sum of theirs. The derivative is that of the
    sample's own loss, taking the loss for the mean over the batch, so that the size of the batches does not matter.

    Padding needs no mask: where the loss does not depend on it the gradient is 0, and where it does, so does the derivative.

    Args:
        model: The model.
        group_sets: Its group sets, which have to be :func:`observable`.
        terms: Terms of whole groups.
        ranks: The processes of a distributed run.
        token_masks: Tells which dimension is the batch's; it has to be entered first.
    """

    def __init__(
        self,
        model: nn.Module,
        group_sets: Sequence[GroupSet],
        terms: Sequence[Term],
        ranks: Ranks | None,
        token_masks: TokenMasks,
    ) -> None:
        self._model = model
        self._token_masks = token_masks
        self._group_sets = group_sets
        self._terms = terms
        self._ranks = ranks
        # by consumer: sets that it reads several of have one mask there
        self._masks: dict[str, list[Tensor]] = {}
        self._features: dict[tuple[str, int, int, torch.device], Tensor] = {}
        self._blocks: dict[Key, list[Tensor]] = {}
        self._sums: dict[tuple[Term, Key], Tensor] = {}
        self._finite: list[Tensor] = []
        self._samples = 0
        # of the batch at hand, as the last consumer saw it whose input shows its samples
        self._batch_size = 0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> MaskCollector:
        for group_set in self._group_sets:
            if group_set.kind == BLOCK:
                derivatives = self._blocks.setdefault(group_set.key, [])
                block = self._model.get_submodule(group_set.name)
                self._handles.append(watch_block(block, derivatives.append, self._token_masks))
            for part in (p for p in group_set.consumers if p.module not in self._masks):
                masks = self._masks[part.module] = []
                module = self._model.get_submodule(part.module)
                hook = self._mask_inputs(masks, described=bool(group_set.block))
                self._handles.append(before_layer(module, hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _mask_inputs(self, masks: list[Tensor], described: bool) -> Callable[[nn.Module, Tensor], Tensor | None]:
        def hook(module: nn.Module, inputs: Tensor) -> Tensor | None:
            if not is_observed():
                return None
            dim = feature_dim(module)
            batch_dim = self._token_masks.batch_dim if dim == -1 and inputs.dim() > 2 else 0
            samples = self._samples_in(inputs, dim, batch_dim, described)
            mask = torch.ones(
                samples,
                inputs.shape[dim],
                dtype=accumulation_dtype(inputs.dtype),
                device=inputs.device,
                requires_grad=torch.is_grad_enabled(),
            )
            masks.append(mask)
            return _Masked.apply(inputs, mask, batch_dim, dim)

        return hook

    def _samples_in(self, inputs: Tensor, dim: int, batch_dim: int, described: bool) -> int:
        """Number of samples in what a consumer reads; 1 where its rows may be tokens of several samples."""
        if inputs.dim() > 2 and inputs.dim() > -dim:
            self._batch_size = inputs.shape[batch_dim]
            return self._batch_size
        if dim != -1 or inputs.dim() != 2:
            return 1
        # two dimensions: tokens in a row in a decoder layer, samples behind a flatten or in a model of no such layers
        return len(inputs) if not described or len(inputs) == self._batch_size else 1

    def start_backward(self) -> None:
        """Drop what backward passes within the forward pass (to inputs, for adversarial samples) have left."""
        for taken in self._blocks.values():
            taken.clear()
        for masks in self._masks.values():
            for mask in masks:
                mask.grad = None

    def skip_batch(self) -> None:
        """Drop everything that the forward pass of a batch has left."""
        for taken in (*self._blocks.values(), *self._masks.values()):
            taken.clear()
        self._batch_size = 0

    @torch.no_grad()
    def _features_of(self, part: Slice, device: torch.device) -> Tensor:
        """The input features of the groups of a slice, on a device; copied there once, not in every batch."""
        key = part.parameter, part.dim, id(part), device
        if key not in self._features:
            features = input_features(self._model.get_submodule(part.module), part.index, part.dim)
            self._features[key] = features.to(device)
        return self._features[key]

    def end_batch(self) -> list[str]:
        """Take what the backward pass of a batch has left.

        Returns:
            Names of the modules that it did not reach.
        """
        derivatives: dict[Key, list[Tensor]] = {s.key: [] for s in self._group_sets}
        scale = loss_scale()
        gradients = {name: [m.grad / scale for m in masks if m.grad is not None] for name, masks in self._masks.items()}
        for group_set in self._group_sets:
            derivatives[group_set.key] += [d[:, None] for d in self._blocks.get(group_set.key, ())]
            for part in group_set.consumers:
                derivatives[group_set.key] += [
                    g[:, self._features_of(part, g.device)].sum(dim=2) for g in gradients[part.module]
                ]
        self.skip_batch()
        missing = [name for (name, _), found in derivatives.items() if not found]
        if missing:
            return missing
        counts = {len(d) for found in derivatives.values() for d in found}
        samples = counts.pop() if len(counts) == 1 else 1
        finite = []
        for key, found in derivatives.items():
            total = sum(d if samples > 1 else d.sum(dim=0, keepdim=True) for d in found)
            assert isinstance(total, Tensor)
            finite.append(total.sum().isfinite())
            for term in self._terms:
                value = term.function(total * samples).sum(dim=0)
                self._sums[term, key] = self._sums[term, key] + value if (term, key) in self._sums else value
        # read only after the last batch: no synchronisation with the device per batch
        self._finite.append(torch.stack(finite))
        self._samples += samples
        return []

    def finish(self) -> dict[tuple[Term, Key, int], Tensor]:
        """The means over the samples of all processes, by term and group set, tensors of shape ``(groups,)``.

        Raises:
            CalibrationError: If a derivative was not finite.
        """
        finite, samples = torch.stack(self._finite), self._samples
        if self._ranks is not None:
            finite = self._ranks.minimum(finite.int()).bool()
            samples = int(self._ranks.sum(torch.tensor(samples)))
        if not bool(finite.all()):
            batch, position = (int(i) for i in (~finite).nonzero()[0])
            raise CalibrationError(
                f"The gradient at {self._group_sets[position].name!r} is not finite in calibration batch {batch}. Nothing was"
                " pruned."
            )
        if self._ranks is not None:
            sizes = [len(value) for value in self._sums.values()]
            total = self._ranks.sum(torch.cat(list(self._sums.values())))
            self._sums = dict(zip(self._sums, total.split(sizes), strict=True))
        return {(term, key, 0): value / samples for (term, key), value in self._sums.items()}
