"""The global group table: one row for every group of the model, with its importance, cost and score."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lit_prune._files import replacing
from lit_prune._renamed import RenamedAttribute
from lit_prune.errors import ArgumentValueError, CalibrationError
from lit_prune.groups import BLOCK, GroupSet, is_inside

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("layer", "kind", "name", "group", "importance", "cost", "score", "kept")


def _schema() -> pa.Schema:
    import pyarrow as pa

    whole, number, text = pa.int64(), pa.float64(), pa.string()
    types = (whole, text, text, whole, number, whole, number, pa.bool_())
    return pa.schema([pa.field(*column, nullable=False) for column in zip(COLUMNS, types, strict=True)])


@dataclass(eq=False)
class GroupTable:
    """All groups of a model, one row each, in the order of the group sets.

    Args:
        keys: Name and kind of every group set.
        layers: Layer of every group set, int array of shape ``(sets,)``.
        offsets: Row at which each set starts, and the number of rows at the end; int array of shape ``(sets + 1,)``.
        importance: Estimated damage to the loss from removing the group, float64 array of shape ``(rows,)``.
        cost: Number of parameters that are removed with the group, int array of shape ``(rows,)``.
        kept: Whether the group is kept, bool array of shape ``(rows,)``.
        minimum: Smallest number of groups with which each set still runs, int array of shape ``(sets,)``; 0 for all if
            ``None``.
            Not written to files.
        equal_parts: Of every set the number of parts that have to keep as many groups as each other, int array of shape
            ``(sets,)``; 1 for all if ``None``. Not written to files.
        multiple_of: Of every set the number that kernels want the kept groups to be a multiple of, int array of shape
            ``(sets,)``; 1 for all if ``None``. Not written to files.
        members: Names of the modules that every set holds parameters of, by which it can be protected, too. Not written to
            files.
        price: What the removal of each group saves, weighted over the limits of a budget, float array of shape ``(rows,)``;
            scores are importance / price then. ``None`` if the budget is one of parameters. Not written to files.
        plan_trade_offs: Computes :attr:`trade_offs`, which takes several more selections. Not written to files.
        counts_tokens: Of every set whether it is a block that counts the tokens of the cache where others do not, bool array of
            shape ``(sets,)``, see :class:`~lit_prune.groups.GroupSet`; of none if ``None``. Not written to files.
    """

    keys: tuple[tuple[str, str], ...]
    layers: np.ndarray
    offsets: np.ndarray
    importance: np.ndarray
    cost: np.ndarray
    kept: np.ndarray
    minimum: np.ndarray | None = None
    equal_parts: np.ndarray | None = None
    multiple_of: np.ndarray | None = None
    members: tuple[tuple[str, ...], ...] | None = None
    price: np.ndarray | None = None
    plan_trade_offs: Callable[[], Mapping[str, Sequence[Mapping[str, float]]]] | None = None
    counts_tokens: np.ndarray | None = None

    @classmethod
    def build(cls, group_sets: Sequence[GroupSet], importance: Sequence[Tensor]) -> GroupTable:
        """Build the table from the group sets and the importance of their groups, tensors of shape ``(groups,)``.

        Raises:
            CalibrationError: If an importance is not finite.
        """
        sizes = np.array([s.size for s in group_sets], dtype=np.int64)
        values = np.concatenate([i.double().cpu().numpy() for i in importance])
        table = cls(
            keys=tuple(s.key for s in group_sets),
            layers=np.array([s.layer for s in group_sets], dtype=np.int64),
            offsets=np.concatenate([[0], sizes.cumsum()]),
            importance=values,
            cost=np.repeat(np.array([s.cost for s in group_sets], dtype=np.int64), sizes),
            kept=np.ones(len(values), dtype=bool),
            minimum=np.array([s.minimum for s in group_sets], dtype=np.int64),
            equal_parts=np.array([s.equal_parts for s in group_sets], dtype=np.int64),
            multiple_of=np.array([s.multiple_of for s in group_sets], dtype=np.int64),
            counts_tokens=np.array([s.counts_tokens for s in group_sets], dtype=bool),
            members=tuple(tuple(dict.fromkeys(part.module for part in s.slices)) for s in group_sets),
        )
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            name, kind = table.keys[int(table.set_of_row[row])]
            raise CalibrationError(
                f"The importance of group {int(table.group[row])} of {name!r} ({kind}) is {values[row]}; expected a finite"
                " number. Nothing was pruned."
            )
        return table

    def __len__(self) -> int:
        return len(self.importance)

    @cached_property
    def trade_offs(self) -> Mapping[str, Sequence[Mapping[str, float]]]:
        """By quantity of a budget, what cuts of rising size cost in importance and save, planned when it is first read; empty
        if the table was read from a file. See :func:`lit_prune.ranking.budget_selection.trade_off`."""
        return {} if self.plan_trade_offs is None else self.plan_trade_offs()

    @property
    def sizes(self) -> np.ndarray:
        """Number of groups of every set."""
        return np.diff(self.offsets)

    @property
    def set_of_row(self) -> np.ndarray:
        """Index of the group set of every row."""
        return np.repeat(np.arange(len(self.keys)), self.sizes)

    @property
    def kind_of_row(self) -> np.ndarray:
        """Kind of every row's group set."""
        return np.array([kind for _, kind in self.keys])[self.set_of_row]

    @property
    def group(self) -> np.ndarray:
        """Index of every row's group within its set."""
        return np.arange(len(self)) - np.repeat(self.offsets[:-1], self.sizes)

    @property
    def score(self) -> np.ndarray:
        """Importance / cost of every row, or / price; the rows with the lowest scores are removed first."""
        if self.price is None:
            return self.importance / self.cost
        return np.divide(self.importance, self.price, out=np.full(len(self), np.inf), where=self.price > 0)

    @property
    def block_of_set(self) -> np.ndarray:
        """For every set the index of the set of the whole block that contains it, -1 if the table has none. A block
        contains itself."""
        blocks = [(position, name) for position, (name, kind) in enumerate(self.keys) if kind == BLOCK]
        around = np.full(len(self.keys), -1, dtype=np.int64)
        for position, block in blocks:
            around[[is_inside(name, block) for name, _ in self.keys]] = position
        return around

    @property
    def block_of_row(self) -> np.ndarray:
        """For every row the row of the whole block that contains it; -1 if the table has none, and for blocks
        themselves."""
        around = self.block_of_set
        rows = np.where((around < 0) | (around == np.arange(len(around))), -1, self.offsets[:-1][around])
        return rows[self.set_of_row]

    @property
    def leaving(self) -> np.ndarray:
        """Whether every row is removed on its own. A row of a removed block is not: the block's cost includes it
        already."""
        return ~self.kept & ~np.append(~self.kept, False)[self.block_of_row]

    @property
    def removed_cost(self) -> int:
        """Number of parameters of the removed rows."""
        return int(self.cost[self.leaving].sum())

    then = RenamedAttribute("compose")

    def compose(self, later: GroupTable) -> GroupTable:
        """Update this table by a later one, computed for the model after this table's groups were removed.

        The groups that this cut took keep the importance they had.
        """
        stays = np.flatnonzero(self.kept & np.append(self.kept, True)[self.block_of_row])
        assert len(stays) == len(later)
        result = replace(self, importance=self.importance.copy(), cost=self.cost.copy(), kept=np.zeros_like(self.kept))
        for column in ("importance", "cost", "kept"):
            getattr(result, column)[stays] = getattr(later, column)
        if self.price is not None and later.price is not None:
            result.price = self.price.copy()
            result.price[stays] = later.price
        return result

    def kept_groups(self) -> list[np.ndarray]:
        """The indices of the kept groups of every set."""
        return [np.flatnonzero(k) for k in np.split(self.kept, self.offsets[1:-1])]

    def removed_groups(self) -> list[Tensor]:
        """The indices of the removed groups of every set."""
        return [torch.from_numpy(np.flatnonzero(~k)) for k in np.split(self.kept, self.offsets[1:-1])]

    def to_arrow(self) -> pa.Table:
        """The table with the columns :data:`COLUMNS`."""
        import pyarrow as pa

        rows = pa.array(self.set_of_row)
        names, kinds = (pa.array(column) for column in zip(*self.keys, strict=True))
        columns = {
            "layer": self.layers[self.set_of_row],
            "kind": pa.DictionaryArray.from_arrays(rows.cast(pa.int32()), kinds).cast(pa.string()),
            "name": pa.DictionaryArray.from_arrays(rows.cast(pa.int32()), names).cast(pa.string()),
            "group": self.group,
            "importance": self.importance,
            "cost": self.cost,
            "score": self.score,
            "kept": self.kept,
        }
        return pa.table(columns)

    @classmethod
    def from_arrow(cls, table: pa.Table) -> GroupTable:
        """The inverse of :meth:`to_arrow`.

        Raises:
            ArgumentValueError: If a column is missing or of another type, or there is no row.
        """
        missing = [c for c in COLUMNS if c not in table.column_names]
        if missing or not len(table):
            raise ArgumentValueError(
                f"A group table must have the columns {', '.join(COLUMNS)} and at least one row; found {len(table)} rows of"
                f" {', '.join(table.column_names)}."
            )
        try:
            table = table.select(COLUMNS).cast(_schema())
        except ValueError as error:
            raise ArgumentValueError(
                "A group table must hold integers for layer, group and cost, numbers for importance and score, true or false"
                f" for kept, and nothing empty: {error}."
            ) from error
        codes = [table[c].combine_chunks().dictionary_encode().indices.to_numpy() for c in ("name", "kind")]
        starts = np.flatnonzero(np.any([np.diff(c, prepend=-1) != 0 for c in codes], axis=0))
        return cls(
            keys=tuple(zip(*(table[c].take(starts).to_pylist() for c in ("name", "kind")), strict=True)),
            layers=table["layer"].to_numpy()[starts],
            offsets=np.array([*starts, len(table)]),
            importance=table["importance"].to_numpy(),
            cost=table["cost"].to_numpy(),
            kept=table["kept"].to_numpy().copy(),
        )

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the table as CSV."""
        import pyarrow.csv

        with replacing(path) as temporary:
            pyarrow.csv.write_csv(self.to_arrow(), temporary)

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write the table as Parquet."""
        import pyarrow.parquet

        with replacing(path) as temporary:
            pyarrow.parquet.write_table(self.to_arrow(), temporary)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> GroupTable:
        """Read a table from a CSV or Parquet file, told by its suffix."""
        import pyarrow.csv
        import pyarrow.parquet

        read = pyarrow.parquet.read_table if Path(path).suffix == ".parquet" else pyarrow.csv.read_csv
        return cls.from_arrow(read(path))
