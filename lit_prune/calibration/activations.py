"""Statistics of the inputs of projections, over the real tokens of calibration batches."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_prune.architectures.features import feature_dim
from lit_prune.architectures.layers import before_layer
from lit_prune.calibration.evaluation import is_observed
from lit_prune.calibration.reduce import add_line, piece_size, pieces
from lit_prune.calibration.statistic_registry import INPUT_SUMS, InputStatistic, get_statistic
from lit_prune.calibration.token_masks import TokenMasks, recomputing
from lit_prune.errors import CalibrationError
from lit_prune.groups import GroupSet
from lit_prune.torch_internals import version_of


@dataclass
class ActivationStatistics:
    """Sums over the tokens that a projection saw, or the positions that a convolution did, one number an input feature.

    Means of no tokens, for an expert, are 0.

    Args:
        count: Number of tokens; of a convolution, that of the spatial positions of its inputs.
        sums: By name the sums that were asked for, of ``"sum"`` (of the values), ``"sum_abs"``, ``"sum_squares"`` and those of
            statistics that were registered; float64 tensors of shape ``(in_features,)``.
    """

    count: int
    sums: dict[str, Tensor]

    def statistic(self, statistic: InputStatistic) -> Tensor:
        """Return a statistic of each feature.

        Raises:
            CalibrationError: If calibration did not keep the sums that it is made of.
        """
        return statistic.value({name: self._total(name) for name in statistic.sums}, max(self.count, 1))

    def _named(self, name: str) -> Tensor:
        statistic = get_statistic(name)
        assert isinstance(statistic, InputStatistic)
        return self.statistic(statistic)

    @property
    def features(self) -> int:
        """Number of input features."""
        return len(next(iter(self.sums.values())))

    def _total(self, name: str) -> Tensor:
        if name not in self.sums:
            raise CalibrationError(
                f"Calibration kept {sorted(self.sums)} of the inputs, not {name!r}: ask for activations=True."
            )
        return self.sums[name]

    @property
    def mean(self) -> Tensor:
        """Mean of each feature."""
        return self._total("sum") / max(self.count, 1)

    @property
    def mean_abs(self) -> Tensor:
        """Mean absolute value of each feature."""
        return self._named("activation_mean_abs")

    @property
    def l1(self) -> Tensor:
        """L1 norm of each feature over all tokens."""
        return self._named("activation_l1")

    @property
    def l2(self) -> Tensor:
        """L2 norm of each feature over all tokens."""
        return self._named("activation_l2")

    @property
    def variance(self) -> Tensor:
        """Population variance of each feature."""
        return self._named("activation_variance")


def observed_modules(group_sets: Sequence[GroupSet]) -> list[str]:
    """Names of the modules of the group sets whose inputs can be observed."""
    return list(dict.fromkeys(s.module for g in group_sets for s in g.slices if s.observable))


class ActivationObserver:
    """Keeps running sums of every projection's input, by forward hooks.

    What activation checkpointing computes anew in a backward pass is not counted again.

    Args:
        model: The model.
        group_sets: Its group sets.
        sums: The sums to keep.
        token_masks: Tells which positions are real; it has to be entered first, and knows of each batch.
    """

    def __init__(
        self, model: nn.Module, group_sets: Sequence[GroupSet], sums: Sequence[str], token_masks: TokenMasks
    ) -> None:
        self._modules = {name: model.get_submodule(name) for name in observed_modules(group_sets)}
        self._sums = sums
        self._token_masks = token_masks
        self._handles: list[RemovableHandle] = []
        self._totals: dict[str, dict[str, Tensor]] = {}
        # of the batch at hand, which may be skipped in the end
        self._batch: dict[str, dict[str, Tensor]] = {}
        # the input of the projection before, if it lives, and its sums: query, key and value have theirs in common
        self._last: tuple[weakref.ref[Tensor], tuple[int, int, int], dict[str, Tensor]] | None = None

    def __enter__(self) -> ActivationObserver:
        for name, module in self._modules.items():
            self._handles.append(before_layer(module, self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def skip_batch(self) -> None:
        """Drop what the forward pass of a batch left."""
        self._batch = {}

    def end_batch(self) -> None:
        """Add what the batch left to the totals."""
        for name, sums in self._batch.items():
            _add_sums(self._totals, name, sums)
        self._batch = {}

    def finish(self) -> dict[str, ActivationStatistics]:
        """The statistics of every module that was called."""
        counts = {name: int(totals.pop("count")) for name, totals in self._totals.items()}
        return {name: ActivationStatistics(counts[name], totals) for name, totals in self._totals.items()}

    def _hook(self, name: str) -> Callable[[nn.Module, Tensor], None]:
        @torch.no_grad()
        def hook(module: nn.Module, inputs: Tensor) -> None:
            if recomputing() or not is_observed():
                return
            dim = feature_dim(module)
            state = (version_of(inputs), self._token_masks.batches, dim)
            if self._last is None or self._last[0]() is not inputs or self._last[1] != state:
                mask = self._token_masks.of(inputs if dim == -1 else inputs.movedim(dim, -1))
                self._last = (weakref.ref(inputs), state, self._sums_of(inputs.detach(), mask, dim))
            _add_sums(self._batch, name, self._last[2])

        return hook

    def _sums_of(self, inputs: Tensor, mask: Tensor | None, dim: int) -> dict[str, Tensor]:
        if dim != -1:
            return self._sums_of_channels(inputs, mask, dim)
        inputs = inputs.reshape(-1, inputs.shape[-1])
        mask = None if mask is None else mask.reshape(-1, 1)
        result = {key: torch.zeros(inputs.shape[-1], dtype=torch.float64, device=inputs.device) for key in self._sums}
        for index in pieces(inputs.shape, piece_size(inputs.device)):
            part = inputs[index].float()
            if mask is not None:
                # not by index, which would wait for the device to say how many there are
                part = torch.where(mask[index], part, 0.0)
            for key, line in result.items():
                line += INPUT_SUMS[key](part).sum(dim=0, dtype=line.dtype)
        result["count"] = torch.tensor(len(inputs), device=inputs.device) if mask is None else mask.sum()
        return result

    def _sums_of_channels(self, inputs: Tensor, mask: Tensor | None, dim: int) -> dict[str, Tensor]:
        """Sums over batch and spatial positions, without a copy that has the channels last."""
        batch, positions = inputs.shape[: inputs.dim() + dim].numel(), inputs.shape[dim + 1 :].numel()
        inputs = inputs.reshape(batch, inputs.shape[dim], positions)
        mask = None if mask is None else mask.reshape(batch, 1, positions).expand_as(inputs)
        result = {key: torch.zeros(inputs.shape[1], dtype=torch.float64, device=inputs.device) for key in self._sums}
        for index in pieces(inputs.shape, piece_size(inputs.device)):
            part = inputs[index].float()
            if mask is not None:
                part = torch.where(mask[index], part, 0.0)
            for key, line in result.items():
                add_line(line, INPUT_SUMS[key](part), 1, index)
        count = torch.tensor(batch * positions, device=inputs.device)
        result["count"] = count if mask is None else mask[:, 0].sum()
        return result


def _add_sums(totals: dict[str, dict[str, Tensor]], name: str, sums: Mapping[str, Tensor]) -> None:
    if name not in totals:
        totals[name] = {key: value.to(torch.float64, copy=True) for key, value in sums.items()}
        return
    for key, value in sums.items():
        totals[name][key] += value
