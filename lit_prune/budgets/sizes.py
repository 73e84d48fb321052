"""Sizes of parameters as functions of how many groups of each set stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from lit_prune.groups import BLOCK, GroupSet, Slice, is_inside


class SizeModel:
    """The number of elements of every parameter, given the number of groups that stay in every set.

    A parameter that groups of two sets share (along two dimensions, or beside each other along one) shrinks with both, so
    sizes are products; that is exact. Everything in a removed block has size 0.

    Args:
        model: The model.
        group_sets: Its group sets.
        counts: Whether a slice makes its parameter smaller, given the set and the slice; all do if ``None``.

    Attributes:
        names: The parameters, tied ones once.
        groups: The number of groups of every set, int array of shape ``(sets,)``.
        block: For every set the index of the set of the block around it, -1 if there is none.
    """

    def __init__(
        self,
        model: nn.Module,
        group_sets: Sequence[GroupSet],
        counts: Callable[[GroupSet, Slice], bool] | None = None,
    ) -> None:
        self.groups = np.array([s.size for s in group_sets], dtype=np.int64)
        unique = dict(model.named_parameters())
        self.names = list(unique)
        places = {id(p): i for i, p in enumerate(unique.values())}
        everything = dict(model.named_parameters(remove_duplicate=False))
        self.block = _blocks_around(group_sets)
        self.block_of_parameter = np.full(len(unique), -1, dtype=np.int64)
        entries: dict[tuple[int, int, int], int] = {}
        lengths: dict[tuple[int, int], int] = {}
        for number, group_set in enumerate(group_sets):
            seen: set[tuple[int, int, str]] = set()
            for part in group_set.slices:
                place = places[id(everything[part.parameter])]
                if group_set.kind == BLOCK:
                    self.block_of_parameter[place] = number
                    continue
                tied = {(p, d) for p, d, name in seen if name != part.parameter}
                if (place, part.dim) in tied or (counts is not None and not counts(group_set, part)):
                    continue
                seen.add((place, part.dim, part.parameter))
                lengths[place, part.dim] = everything[part.parameter].shape[part.dim]
                # groups of equal parts may name the same positions
                positions = len(part.index.unique())
                entries[place, part.dim, number] = entries.get((place, part.dim, number), 0) + positions
        pairs = {pair: i for i, pair in enumerate(lengths)}
        self._parameter_of_pair = np.array([p for p, _ in lengths], dtype=np.int64)
        self._length_of_pair = np.array(list(lengths.values()), dtype=np.int64)
        self._pair = np.array([pairs[p, d] for p, d, _ in entries], dtype=np.int64)
        self._set = np.array([s for _, _, s in entries], dtype=np.int64)
        self._positions = np.array(list(entries.values()), dtype=np.int64)
        self._rest = np.array([p.numel() for p in unique.values()], dtype=np.int64)
        whole = np.ones_like(self._rest)
        np.multiply.at(whole, self._parameter_of_pair, self._length_of_pair)
        self._rest //= np.maximum(whole, 1)

    def alive(self, kept: np.ndarray) -> np.ndarray:
        """For every set whether no block around it is removed."""
        return np.append(kept > 0, True)[self.block] | (self.block < 0)

    def elements(self, kept: np.ndarray) -> np.ndarray:
        """The number of elements of every parameter, int array of shape ``(parameters,)``.

        Args:
            kept: The number of groups that stay in every set, int array of shape ``(sets,)``.
        """
        return self._elements(kept)[0]

    def _elements(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        groups = np.maximum(self.groups, 1)
        leaves = self._positions * (self.groups - kept)[self._set] // groups[self._set]
        left = self._length_of_pair.copy()
        np.subtract.at(left, self._pair, leaves)
        elements = self._rest.copy()
        np.multiply.at(elements, self._parameter_of_pair, left)
        gone = (self.block_of_parameter >= 0) & ~(np.append(kept > 0, True)[self.block_of_parameter])
        elements[gone] = 0
        return elements, left

    def saved(self, weight: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """What one more group of each set saves of the weighted sum of sizes, float array of shape ``(sets,)``.

        Args:
            weight: Weight of one element of each parameter, shape ``(parameters,)``.
            kept: The number of groups that stay in every set.
        """
        elements, left = self._elements(kept)
        owner = self._parameter_of_pair[self._pair]
        width = self._positions / np.maximum(self.groups, 1)[self._set]
        each = weight[owner] * elements[owner] / np.maximum(left[self._pair], 1) * width
        # of no sets but blocks the counts are whole numbers
        saved = np.bincount(self._set, weights=each, minlength=len(self.groups)).astype(np.float64)
        inside = self.block_of_parameter >= 0
        saved += np.bincount(
            self.block_of_parameter[inside], weights=(weight * elements)[inside], minlength=len(self.groups)
        )
        return saved


def innermost_sets(module: str, group_sets: Sequence[GroupSet]) -> list[int]:
    """The sets of the innermost module that is a module or around it and has some; blocks are not meant."""
    around = [(len(s.name), i) for i, s in enumerate(group_sets) if s.kind != BLOCK and is_inside(module, s.name)]
    return [i for length, i in around if length == max(around)[0]]


def block_around(module: str, group_sets: Sequence[GroupSet]) -> int | None:
    """The set of the block that a module is in, ``None`` if it is in none."""
    around = [(len(s.name), i) for i, s in enumerate(group_sets) if s.kind == BLOCK and is_inside(module, s.name)]
    return max(around)[1] if around else None


def _blocks_around(group_sets: Sequence[GroupSet]) -> np.ndarray:
    blocks = [(i, s.name) for i, s in enumerate(group_sets) if s.kind == BLOCK]
    around = np.full(len(group_sets), -1, dtype=np.int64)
    for number, group_set in enumerate(group_sets):
        if group_set.kind != BLOCK:
            around[number] = next((i for i, name in blocks if is_inside(group_set.name, name)), -1)
    return around


@dataclass(eq=False)
class SizeSum:
    """A quantity that is a weighted sum of parameter sizes, and something for every group beside them.

    Args:
        sizes: The sizes.
        weight: Weight of one element of each parameter, shape ``(parameters,)``.
        per_group: What one group of each set adds on top, shape ``(sets,)``: the attention over a head, its cache.
        constant: What stays, whatever is removed.
    """

    sizes: SizeModel
    weight: np.ndarray
    per_group: np.ndarray
    constant: float = 0

    def value(self, kept: np.ndarray) -> float:
        """The quantity, given the number of groups that stay in every set."""
        beside = (self.per_group * kept)[self.sizes.alive(kept)].sum()
        # whole numbers stay exact
        total = self.constant + (self.weight * self.sizes.elements(kept)).sum() + beside
        return total.item() if isinstance(total, np.generic) else total

    def saved(self, kept: np.ndarray) -> np.ndarray:
        """What one more group of each set saves, float array of shape ``(sets,)``."""
        saved = self.sizes.saved(self.weight, kept) + self.per_group
        inside = self.sizes.block >= 0
        saved += np.bincount(self.sizes.block[inside], weights=(self.per_group * kept)[inside], minlength=len(saved))
        return saved
