"""Predicts the time of a cut model from a table of measured times."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lit_prune.budgets.latency_table import LatencyTable
from lit_prune.budgets.sizes import SizeSum
from lit_prune.errors import ArgumentValueError
from lit_prune.groups import BLOCK, GroupSet


class LatencyModel:
    """Seconds of one phase, given the number of groups that stay in every set.

    Each set saves what the table says, and a removed block what a block takes. Where sets share weights (channels that one
    convolution gives and the next reads), the savings do not add up: each is scaled by what the set saves of FLOPs halfway to
    the cut against what it saves of the whole model, which is exact for FLOPs.

    Args:
        table: The measured times.
        group_sets: The group sets of the model that they were measured of.
        flops: FLOPs of that model.

    Attributes:
        correction: What savings are multiplied by, as learnt from a cut like the one asked for.

    Raises:
        ArgumentValueError: If the table lacks a set.
    """

    def __init__(self, table: LatencyTable, group_sets: Sequence[GroupSet], flops: SizeSum) -> None:
        self.table, self.flops, self.correction = table, flops, 1.0
        self.sizes = np.array([s.size for s in group_sets], dtype=np.int64)
        self.is_block = np.array([s.kind == BLOCK for s in group_sets], dtype=bool)
        rows = {(name, t.kind): i for i, t in enumerate(table.times) for name in t.sets}
        # a set that cannot be made smaller has no times
        self.row = np.array([rows.get(s.key, -1) for s in group_sets], dtype=np.int64)
        lacking = [s.key for s, row in zip(group_sets, self.row, strict=True) if row < 0 and s.kind == BLOCK]
        if lacking:
            raise ArgumentValueError(
                f"The latency table has no times of {lacking[0][0]!r} ({lacking[0][1]}). Measure them with"
                " lit_prune.measure_latency(model, blocks=True)."
            )
        self.multiple = np.array([1 if row < 0 else table.times[row].multiple for row in self.row], dtype=np.int64)
        self._rate = flops.saved(self.sizes)

    def value(self, kept: np.ndarray) -> float:
        """The seconds; ``kept`` is an int array of shape ``(sets,)``."""
        alive = self.flops.sizes.alive(kept)
        return self.table.seconds - self.correction * float((self._savings(kept) * self._overlap(kept))[alive].sum())

    def saved(self, kept: np.ndarray) -> np.ndarray:
        """What one more group of each set saves, on average over the next half of its groups."""
        low = kept // 2
        saved = (self._savings(low) - self._savings(kept)) / np.maximum(kept - low, 1)
        saved = np.where(self.is_block, self._savings(np.zeros_like(kept)), saved) * self._overlap(kept)
        inside = self.flops.sizes.block
        already = self._savings(kept) * self._overlap(kept)
        within = np.bincount(inside[inside >= 0], weights=already[inside >= 0], minlength=len(kept))
        return self.correction * np.where(self.is_block, np.maximum(saved - within, 0), saved)

    def _savings(self, kept: np.ndarray) -> np.ndarray:
        saved = np.zeros(len(kept))
        for number, times in enumerate(self.table.times):
            mine = self.row == number
            saved[mine] = times.at(kept[mine])
        return saved

    def _overlap(self, kept: np.ndarray) -> np.ndarray:
        """What each set saves of FLOPs halfway to a cut, as a part of what it saves of the whole model."""
        middle = np.where(self.is_block, self.sizes, (self.sizes + kept + 1) // 2)
        halfway = self.flops.saved(middle)
        part = np.divide(halfway, self._rate, out=np.ones(len(kept)), where=self._rate > 0)
        return np.where(self.is_block, 1.0, part)
