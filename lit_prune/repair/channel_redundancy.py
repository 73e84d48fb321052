"""Fraction of each group that a regression on the other groups cannot reconstruct, for groups that are read anywhere.

As :mod:`lit_prune.repair.redundancy` does for chains of decoder layers, in one pass for all layers. The samples of a
convolution are the positions of its input, its variables the channels: what a channel's neighbourhood could add is not
looked at, so that the matrices stay small (channels, not channels times places in the kernel).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lit_prune.architectures.features import feature_dim, input_features
from lit_prune.calibration.gram import Gram
from lit_prune.calibration.precision import accumulation_dtype
from lit_prune.distributed.sharing import Turns
from lit_prune.groups import GroupSet, Slice
from lit_prune.repair.passes import Call, Data, Passes
from lit_prune.repair.patches import is_product, matrix_of, taps
from lit_prune.repair.regression import SHARE_DAMPING, _relative, unexplained_share

# rows of a call: so many for each feature, and at least so many
_ROWS_PER_FEATURE, _FEWEST_ROWS = 4, 2**12
# a layer with more features (behind a flatten) is looked at set by set, one variable a group
_MOST_FEATURES = 2**12


@torch.no_grad()
def unexplained_anywhere(
    model: nn.Module,
    group_sets: Sequence[GroupSet],
    data: Data,
    *,
    root: nn.Module | None = None,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> dict[tuple[str, str], Tensor]:
    """Fraction of each group's contribution to its consumers that a regression on the other inputs there cannot reconstruct.

    A group that several layers read has a share in each of them; the result is their mean, weighted by how much of what all
    groups of the set contribute to a layer is the group's.

    Args:
        model: The model; it is not changed.
        group_sets: Its group sets, of groups alone.
        data: Gives the calibration batches and the function that runs one.
        root: The module that holds the model, if the function runs more than the model.
        all_reduce: Sums a tensor over the processes that calibrate on batches of their own, if there are several.
        seed: Seed of the choice of rows, of which a call gives at most 4 for each feature, and at least 4096.

    Returns:
        By key of the group set, shares in (0, 1], tensors of shape ``(groups,)``; empty if some set's consumers cannot be
        observed.
    """
    if not all(s.consumers and len(s.repairable) == len(s.consumers) for s in group_sets):
        return {}
    uses: dict[str, list[tuple[GroupSet, Slice]]] = {}
    for group_set in group_sets:
        for part in group_set.consumers:
            uses.setdefault(part.module, []).append((group_set, part))
    if not all(is_product(model.get_submodule(name)) for name in uses):
        return {}
    grams = {name: _Grams(model.get_submodule(name), of_one) for name, of_one in uses.items()}

    def take(call: Call) -> Tensor:
        return _rows(call, seed)

    def use(taken: Mapping[str, Sequence[Tensor]]) -> None:
        for name, found in taken.items():
            for rows in found:
                grams[name].add(rows)

    Passes(model, data, root).run(uses, take, use)
    weighted: dict[tuple[str, str], Tensor] = {s.key: torch.zeros(s.size, dtype=torch.float32) for s in group_sets}
    weights = {s.key: torch.zeros(s.size, dtype=torch.float32) for s in group_sets}
    turns = Turns()
    parts: dict[tuple[tuple[str, str], str, int], Tensor] = {}
    for name, of_one in uses.items():
        grams[name].add_up(all_reduce)
        for position, (group_set, part) in enumerate(of_one):
            energy, share = grams[name].share(position, model.get_parameter(part.parameter))
            parts[group_set.key, name, position] = (
                energy / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)
            ).cpu()
            turns.add((group_set.key, name, position), group_set.size, share)
    shares = turns.results()
    for (key, name, position), part_of_layer in parts.items():
        weighted[key] += shares[key, name, position] * part_of_layer
        weights[key] += part_of_layer
    tiny = torch.finfo(torch.float32).tiny
    return {
        key: torch.where(weights[key] > tiny, value / weights[key].clamp_min(tiny), 1.0).clamp(1e-6, 1.0)
        for key, value in weighted.items()
    }


def _rows(call: Call, seed: int) -> Tensor:
    """Some rows of features that a layer was called with, drawn by a seed."""
    inputs, dim = call.inputs, feature_dim(call.module)
    features = inputs if dim == -1 else inputs.movedim(dim, -1)
    mask = call.mask(features)
    count = features.numel() // max(1, features.shape[-1])
    rows = torch.arange(count) if mask is None else mask.flatten().nonzero().flatten().cpu()
    most = max(_FEWEST_ROWS, _ROWS_PER_FEATURE * features.shape[-1])
    if len(rows) > most:
        key = zlib.crc32(f"{call.name}/{call.batch}/{call.number}/{seed}".encode())
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(key))[:most].sort().values]
    place = torch.unravel_index(rows.to(inputs.device), features.shape[:-1])
    return features[place]


class _Grams:
    """The Gram matrices of what a layer reads: one of all its features, or one for each set where these are too many.

    Args:
        module: The layer.
        uses: The sets that it reads, and the slices of its weight that are theirs.
    """

    def __init__(self, module: nn.Module, uses: Sequence[tuple[GroupSet, Slice]]) -> None:
        self._module = module
        self._features = [input_features(module, part.index, part.dim) for _, part in uses]
        self._parts = [part for _, part in uses]
        weight: Tensor = module.weight  # type: ignore[assignment]
        width = weight.shape[self._parts[0].dim]
        self._apart = width > _MOST_FEATURES
        sizes = [len(index) for index in self._features] if self._apart else [width]
        precision = accumulation_dtype(weight.dtype)
        self._sums = [Gram(size, weight.device, precision) for size in sizes]
        self._rows = [torch.zeros((), dtype=precision, device=weight.device) for _ in sizes]

    def add(self, rows: Tensor) -> None:
        """Add rows, shape ``(rows, features)``."""
        for number, samples in enumerate(self._samples(rows)):
            self._sums[number].add(samples)
            self._rows[number] += len(samples)

    def _samples(self, rows: Tensor) -> list[Tensor]:
        if not self._apart:
            return [rows]
        # the features of a group are samples of one variable
        return [rows[:, index.to(rows.device)].transpose(1, 2).flatten(0, 1) for index in self._features]

    def add_up(self, all_reduce: Callable[[Tensor], Tensor] | None) -> None:
        """Add up what several processes have."""
        if all_reduce is None:
            return
        for gram in self._sums:
            gram.replace(all_reduce)
        self._rows = [all_reduce(count) for count in self._rows]

    def share(self, position: int, weight: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        """Of a set that the layer reads: what each group contributes, and what gives the share that others cannot explain."""
        part = self._parts[position]
        number = position if self._apart else 0
        gram, rows = self._sums[number].matrix, self._rows[number]
        if not float(rows):
            size = len(part.index)
            return torch.zeros(size, dtype=torch.float64), partial(torch.ones, size, dtype=torch.float32)
        relative = _relative(SHARE_DAMPING, gram, rows)
        columns = matrix_of(self._module, weight).double()
        # the length of the weights that read a feature, over outputs and places in the kernel
        lengths = columns.view(len(columns), -1, taps(self._module)).square().sum(dim=(0, 2))
        of_group = lengths[part.index.to(lengths.device)]
        if self._apart:
            index = torch.arange(len(part.index))[:, None]
            energy = gram.diagonal().double() * of_group.sum(dim=1)
            return energy, partial(unexplained_share, gram, gram.new_ones(1, len(gram)), index, relative)
        energy = (gram.diagonal().double()[part.index.to(gram.device)] * of_group).sum(dim=1)
        by_tap = columns.view(len(columns), -1, taps(self._module)).transpose(1, 2).flatten(0, 1)
        return energy, partial(unexplained_share, gram, by_tap, part.index, relative)
