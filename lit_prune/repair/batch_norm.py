"""Recalibration: running means and variances of batch norms, estimated anew after a cut.

A batch norm in eval mode scales by the mean and variance that it saw in training. Once channels before it are gone, what it
reads has others, and the error multiplies from norm to norm.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.calibration.precision import accumulation_dtype
from lit_prune.groups import GroupSet
from lit_prune.plan import PruningPlan
from lit_prune.repair.passes import Call, Data, Passes
from lit_prune.torch_internals import AnyBatchNorm

_BUFFERS = ("running_mean", "running_var")


def batch_norms(model: nn.Module) -> dict[str, Any]:
    """The batch norms of a model that keep running statistics, by path."""
    found: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, AnyBatchNorm)}
    return {n: m for n, m in found.items() if m.running_mean is not None and m.running_mean.numel()}


@torch.no_grad()
def recalibrate_batch_norms(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    plan: PruningPlan,
    data: Data,
    *,
    root: nn.Module | None = None,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
) -> Callable[[], None]:
    """Set the running statistics of the batch norms that run after what lost inputs to those of the calibration batches.

    In one pass every such norm scales by the statistics of the batch at hand, as in training, and everything else runs in
    eval mode. The means and variances that stay are those over all batches and positions together, exactly. Nothing else
    changes: not the number of batches that a norm has tracked, nor random numbers. Norms that no batch reached, or that saw
    one value a channel, keep what they have.

    Args:
        model: The model after the cut.
        group_sets: Its group sets before the cut.
        plan: The plan that was carried out.
        data: Gives the calibration batches and the function that runs one.
        root: The module that holds the model, if the function runs more than the model.
        all_reduce: Sums a tensor over the processes that calibrate on batches of their own, if there are several.

    Returns:
        A function that puts the old statistics back.

    Reference: Li et al., EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning, ECCV 2020.
    """
    norms = batch_norms(model)
    readers = _readers(model, group_sets, plan)
    if not norms or not (readers or plan.removed_blocks):
        return lambda: None
    recorder = _Recorder(norms, readers, everything=bool(plan.removed_blocks))
    try:
        Passes(model, data, root).run([*norms, *readers], recorder.take, recorder.use, before=recorder.before)
    finally:
        recorder.put_back()
    previous = {name: {n: getattr(norm, n).clone() for n in _BUFFERS} for name, norm in norms.items()}
    for name, norm in norms.items():
        _write(norm, recorder.sums[name] if all_reduce is None else all_reduce(recorder.sums[name]))

    def undo() -> None:
        with torch.no_grad():
            for name, norm in norms.items():
                for buffer in _BUFFERS:
                    getattr(norm, buffer).copy_(previous[name][buffer])

    return undo


def _readers(model: nn.Module, group_sets: Sequence[GroupSet], plan: PruningPlan) -> set[str]:
    """Paths of the modules that read groups some of which are gone."""
    by_key = {s.key: s for s in group_sets}
    parts = [part for entry in plan.group_entries for part in by_key[entry.key].masked]
    # what cannot be observed may be read by the module around its own, which then is not called
    names = {part.module for part in parts} | {p.module.rpartition(".")[0] for p in parts if p.unobservable_input}
    return names & dict(model.named_modules(remove_duplicate=False)).keys()


class _Recorder:
    """Lets batch norms scale by the statistics of what they are called with, and adds these up.

    Args:
        norms: The norms by path.
        readers: Modules; norms that run before the first of them in a batch are left alone.
        everything: Whether no norm is left alone.
    """

    def __init__(self, norms: Mapping[str, Any], readers: Collection[str], everything: bool) -> None:
        # by norm: number of values a channel, their sum and that of their squares
        self.sums = {name: _zeros(norm) for name, norm in norms.items()}
        self._norms, self._readers, self._everything = norms, readers, everything
        self._changed_in = -1
        self._swapped: list[tuple[Any, dict[str, Tensor]]] = []

    def before(self, call: Call) -> None:
        """Let a norm have the statistics of its input for the call that follows."""
        if call.name in self._readers:
            self._changed_in = call.run
        if call.name in self._norms and self._sees_changes(call) and _values(call.inputs) > 1:
            norm = self._norms[call.name]
            mean, variance = _moments(call.inputs)
            self._swapped.append((norm, {name: getattr(norm, name) for name in _BUFFERS}))
            norm.running_mean, norm.running_var = mean.to(norm.running_mean), variance.to(norm.running_var)

    def take(self, call: Call) -> Tensor | None:
        """Put the norm's own statistics back; what it read, in sums."""
        while self._swapped and self._swapped[-1][0] is call.module:
            self._put_back_last()
        if call.name not in self._norms or not self._sees_changes(call):
            return None
        mean, variance = (moment.to(self.sums[call.name]) for moment in _moments(call.inputs))
        count = torch.full_like(mean, _values(call.inputs))
        return torch.stack([count, mean * count, (variance + mean.square()) * count])

    def use(self, taken: Mapping[str, Sequence[Tensor | None]]) -> None:
        """Add up a batch."""
        for name, found in taken.items():
            for values in (v for v in found if v is not None):
                self.sums[name] += values

    def put_back(self) -> None:
        """Put back the statistics of norms whose call met an error."""
        while self._swapped:
            self._put_back_last()

    def _sees_changes(self, call: Call) -> bool:
        return self._everything or self._changed_in == call.run

    def _put_back_last(self) -> None:
        norm, values = self._swapped.pop()
        for name, value in values.items():
            setattr(norm, name, value)


def _zeros(norm: Any) -> Tensor:
    # Apple's devices have no float64
    precision = torch.float32 if norm.running_mean.device.type == "mps" else torch.float64
    return torch.zeros(3, len(norm.running_mean), dtype=precision, device=norm.running_mean.device)


def _values(inputs: Tensor) -> int:
    """Number of values of each channel."""
    return inputs.numel() // max(1, inputs.shape[1])


def _moments(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance of each channel, along dimension 1."""
    values = inputs.to(accumulation_dtype(inputs.dtype))
    variance, mean = torch.var_mean(values, dim=[d for d in range(inputs.dim()) if d != 1], correction=0)
    return mean, variance


def _write(norm: Any, sums: Tensor) -> None:
    """Give a norm the mean and the unbiased variance of what it read, as training would."""
    count, values, squares = sums
    if float(count[0]) > 1:
        mean = values / count
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((squares / count - mean.square()).clamp_min(0) * count / (count - 1))
