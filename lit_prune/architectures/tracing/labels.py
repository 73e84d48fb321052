"""Labels of positions of parameters, and which of them can only be removed together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# two labels as one number
_CODE = 2**31


@dataclass(frozen=True)
class Atoms:
    """The labels of all positions along one dimension of a parameter or buffer.

    Args:
        name: Qualified name of the parameter or buffer, relative to the model.
        dim: The dimension.
        start: The label of position 0; position ``i`` has the label ``start + i``.
        size: Number of positions.
        is_buffer: Whether the name is that of a buffer.
    """

    name: str
    dim: int
    start: int
    size: int
    is_buffer: bool = False

    def labels(self) -> Tensor:
        """The labels, shape ``(size,)``."""
        return torch.arange(self.start, self.start + self.size)


class Labels:
    """Labels, and what a run says of them: which belong together, which have to stay, and which are read by weights.

    A label is an integer. Labels that are united can only be removed together. The classes are computed when they are
    asked for; until then unions are pairs of labels in a list.
    """

    def __init__(self) -> None:
        self.count = 0
        self.atoms: list[Atoms] = []
        self._pairs: list[Tensor] = []
        self._frozen: list[tuple[Tensor, int]] = []
        self._balanced: list[tuple[Tensor, bool]] = []
        self._starts: list[int] = []
        self._classes: np.ndarray | None = None

    def new_atoms(self, name: str, dim: int, size: int, is_buffer: bool = False) -> Tensor:
        """New labels for the positions along one dimension of a parameter, shape ``(size,)``."""
        self.atoms.append(Atoms(name, dim, self.count, size, is_buffer))
        return self.new(size)

    def new(self, size: int) -> Tensor:
        """New labels, shape ``(size,)``."""
        start = self.count
        self.count += size
        self._classes = None
        return torch.arange(start, start + size)

    def unite(self, first: Tensor, second: Tensor) -> None:
        """Unite labels position by position.

        Args:
            first: Labels.
            second: Labels of a shape that broadcasts against that of ``first``.
        """
        a, b = (x.reshape(-1) for x in torch.broadcast_tensors(first, second))
        codes = torch.unique((a * _CODE + b)[a != b])
        if len(codes):
            self._pairs.append(torch.stack([codes // _CODE, codes % _CODE]))
            self._classes = None

    def freeze(self, labels: Tensor, reason: int) -> None:
        """Let positions stay whole, whatever else is removed.

        Args:
            labels: The labels.
            reason: A number that says why, for reports.
        """
        if labels.numel():
            self._frozen.append((torch.unique(labels), reason))

    def balance(self, rows: Tensor, *, or_rows: bool) -> None:
        """Let every row lose the same number of positions, or (``or_rows``) whole rows be removed.

        What is united later decides whether that is so already; if not, the rows are united position by position.

        Args:
            rows: Labels, shape ``(rows, positions)``.
            or_rows: Whether the rows themselves may be removed.
        """
        self._balanced.append((rows.clone(), or_rows))

    def owners(self, labels: Tensor) -> list[Atoms]:
        """The parameters and dimensions that some labels were made for."""
        if not self._starts or len(self._starts) != len(self.atoms):
            self._starts = [a.start for a in self.atoms]
        found: dict[int, Atoms] = {}
        values = np.unique(labels.numpy())
        for position in np.unique(np.searchsorted(self._starts, values, side="right") - 1):
            atoms = self.atoms[position]
            inside = (values >= atoms.start) & (values < atoms.start + atoms.size)
            if inside.any():
                found[int(position)] = atoms
        return list(found.values())

    def settle(self) -> None:
        """Unite what :meth:`balance` asks for and what was not united by then."""
        while True:
            changed = False
            for rows, or_rows in self._balanced:
                classes = self.classes()[rows.numpy()]
                ordered = np.sort(classes, axis=1)
                if (ordered == ordered[:1]).all() or (or_rows and (ordered[:, 0] == ordered[:, -1]).all()):
                    continue
                self.unite(rows, rows[:1])
                changed = True
            if not changed:
                return

    def classes(self) -> np.ndarray:
        """The smallest label of the class of every label, shape ``(labels,)``."""
        if self._classes is None:
            self._classes = _components(self.count, self._pairs)
            roots = torch.from_numpy(self._classes)
            # what is known by now need not be looked at again
            self._pairs = [torch.stack([torch.arange(self.count), roots])]
        return self._classes

    def frozen(self) -> Iterator[tuple[np.ndarray, int]]:
        """The classes that have to stay, with the number that says why."""
        classes = self.classes()
        for labels, reason in self._frozen:
            yield np.unique(classes[labels.numpy()]), reason


def _components(count: int, pairs: list[Tensor]) -> np.ndarray:
    """The smallest member of the connected component of every node."""
    parent = np.arange(count)
    if not pairs:
        return parent
    first, second = torch.cat(pairs, dim=1).numpy()
    while True:
        a, b = parent[first], parent[second]
        differ = a != b
        if not differ.any():
            return parent
        first, second, a, b = first[differ], second[differ], a[differ], b[differ]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while True:
            shorter = parent[parent]
            if np.array_equal(shorter, parent):
                break
            parent = shorter
