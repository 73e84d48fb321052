"""Keeps names of release 0.1 usable until 0.3, with a DeprecationWarning that gives the new name."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def _warn(what: str, old: str, new: str, stacklevel: int) -> None:
    warnings.warn(
        f"{what}: {old!r} is now called {new!r}; the old name goes away in lit_prune 0.3.",
        DeprecationWarning,
        stacklevel=stacklevel + 1,
    )


def renamed_arguments(**names: str) -> Callable[[F], F]:
    """Decorate a function so that it also takes arguments by their old names.

    Args:
        names: The new name of an argument by its old one.

    Raises:
        TypeError: When the function is called with both names of an argument.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for old in kwargs.keys() & names.keys():
                if names[old] in kwargs:
                    raise TypeError(f"{function.__qualname__}() got both {names[old]!r} and its old name {old!r}.")
                _warn(f"{function.__qualname__}()", old, names[old], 2)
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper  # type: ignore[return-value]

    return decorate


def renamed_fields(**names: str) -> Callable[[type[T]], type[T]]:
    """Decorate a dataclass so that its fields can also be given and read by their old names.

    Args:
        names: The new name of a field by its old one.
    """

    def decorate(cls: type[T]) -> type[T]:
        cls.__init__ = renamed_arguments(**names)(cls.__init__)  # type: ignore[method-assign]
        for old, new in names.items():
            setattr(cls, old, RenamedAttribute(new))
            RenamedAttribute.__set_name__(cls.__dict__[old], cls, old)
        return cls

    return decorate


class RenamedAttribute:
    """A class attribute that stands for another attribute or method of the instance.

    Args:
        new: Name of the other attribute.
    """

    def __init__(self, new: str) -> None:
        self.new = new
        self.old = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        _warn(owner.__name__, self.old, self.new, 2)
        return getattr(instance, self.new)
