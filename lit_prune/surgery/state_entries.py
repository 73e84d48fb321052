"""What an optimizer's state for one parameter consists of: tensors and sequences of whole numbers, and where they are."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lit_prune.surgery.optimizer_search import is_optimizer

Path = tuple[Any, ...]


class Position(int):
    """A position in a sequence, in a path."""


class AttributeName(str):
    """The name of an object's attribute, in a path."""


@dataclass(frozen=True)
class Found:
    """Something in an optimizer's state for one parameter.

    Args:
        path: Keys, positions and attribute names that lead to it from the parameter's state.
        value: A tensor, or a sequence of whole numbers.
        holder: The mapping that it is in, if it is in one.
    """

    path: Path
    value: Any
    holder: Any = None

    def inside(self, kind: type) -> bool:
        """Whether a position in a sequence, or an attribute of an object, leads to it."""
        return any(isinstance(key, kind) for key in self.path)

    def __str__(self) -> str:
        first, *rest = (
            str(k) if isinstance(k, AttributeName) else int(k) if isinstance(k, Position) else k for k in self.path
        )
        return repr(first) + "".join(f"[{key!r}]" for key in rest)


def entries_in(value: Any, path: Path = (), holder: Any = None, seen: set[int] | None = None) -> Iterator[Found]:
    """All tensors and sequences of whole numbers in a parameter's state, also in mappings, sequences and objects within it."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield Found(path, value, holder)
        return
    if isinstance(value, (str, bytes, int, float, complex, type, nn.Module)) or value is None or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        for key, item in list(value.items()):
            yield from entries_in(item, (*path, key if isinstance(key, (str, int, float)) else id(key)), value, seen)
    elif isinstance(value, (Sequence, deque, set)):
        if len(value) and all(type(item) is int for item in value):
            yield Found(path, value, holder)
        for position, item in enumerate(value):
            yield from entries_in(item, (*path, Position(position)), None, seen)
    elif not callable(value) and hasattr(value, "__dict__") and not is_optimizer(value):
        for name, item in list(vars(value).items()):
            yield from entries_in(item, (*path, AttributeName(name)), None, seen)


def tensors_in(state: Any) -> Iterator[Found]:
    """All tensors in a parameter's state, also in mappings, sequences and objects within it."""
    yield from (found for found in entries_in(state) if isinstance(found.value, Tensor))
