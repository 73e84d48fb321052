"""One line of a pruning plan: what stays of a group set; how it is read, and renumbered where blocks leave."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lit_prune.arguments import MOST_GROUPS
from lit_prune.errors import PlanError
from lit_prune.groups import BLOCK
from lit_prune.modeling_pruned import from_ranges

MOST_BLOCKS = 100_000


@dataclass(frozen=True)
class PlanEntry:
    """The kept groups of one group set; with the kind ``"block"`` the kept blocks of a list of blocks.

    Args:
        name: Name of the group set; of the list of blocks (``model.layers``) for blocks.
        kind: Its kind.
        layer: Its layer; 0 for blocks.
        size: Number of groups, or blocks, in the model that the plan is for.
        kept: Indices of the kept ones, ascending.
    """

    name: str
    kind: str
    layer: int
    size: int
    kept: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the indices.

        Raises:
            PlanError: If they are not ascending, distinct and within the set, or the set is larger than any model's.
        """
        if not 0 <= self.size <= (MOST_BLOCKS if self.kind == BLOCK else MOST_GROUPS):
            raise PlanError(f"{self.name!r} ({self.kind}) cannot have {self.size:,} groups.")
        ascending = bool((np.diff(np.asarray(self.kept)) > 0).all())
        if not ascending or (self.kept and not 0 <= self.kept[0] <= self.kept[-1] < self.size):
            raise PlanError(
                f"The kept groups of {self.name!r} ({self.kind}) must be ascending and within 0..{self.size - 1}; found"
                f" {list(self.kept[:10])}{'...' if len(self.kept) > 10 else ''}."
            )

    @property
    def key(self) -> tuple[str, str]:
        """Name and kind."""
        return self.name, self.kind


def _moved(name: str, layer: int, moved: Mapping[str, Mapping[int, int]]) -> tuple[str, int]:
    """Name and layer of something, once the blocks of some lists have other indices.

    Raises:
        PlanError: If it is in a block that is not there.
    """
    for stack, indices in moved.items():
        if name.startswith(f"{stack}."):
            index, _, rest = name.removeprefix(f"{stack}.").partition(".")
            if not re.fullmatch("[0-9]+", index) or int(index) not in indices:
                raise PlanError(
                    f"The plans do not compose: {name!r} is in none of the {len(indices)} blocks of {stack!r}."
                )
            layer = indices[int(index)]
            name = ".".join(part for part in (stack, str(layer), rest) if part)
    return name, layer


def _renumbered(entry: PlanEntry, moved: Mapping[str, Mapping[int, int]]) -> PlanEntry:
    name, layer = _moved(entry.name, entry.layer, moved)
    return replace(entry, name=name, layer=layer)


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected an integer, found {value!r}")
    return value


def _kept(values: Any, size: Any) -> tuple[int, ...]:
    """Indices, as ranges or one by one."""
    if isinstance(values, str):
        return tuple(from_ranges(values, size))
    # by type, in C: a large model has millions of them
    if not set(map(type, _list(values))) <= {int}:
        raise TypeError(f"expected integers, found {next(v for v in values if type(v) is not int)!r}")
    return tuple(values)


def _list(values: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"expected a list, found {values!r:.80}")
    return values


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {value!r}")
    return value
