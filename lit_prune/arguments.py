"""Checks of arguments by type and range, made of pydantic types, with one form of message for all of them."""

from __future__ import annotations

import functools
import operator
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import numpy as np
import torch
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    GetPydanticSchema,
    InstanceOf,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import core_schema

from lit_prune.errors import ArgumentTypeError, ArgumentValueError

T = TypeVar("T")
BIGGEST = 2**63 - 1
MOST_GROUPS = 2**31 - 1
# every iteration, and every stage of a schedule, is a calibration of its own
MOST_CUTS = 10_000


def plain(value: Any) -> Any:
    """A scalar of numpy or torch as a Python number, their arrays and ranges as lists; anything else as it is."""
    if isinstance(value, (np.generic, np.ndarray, range)):
        return list(value) if isinstance(value, range) else value.tolist()
    if isinstance(value, torch.Tensor) and not value.is_meta and value.layout == torch.strided:
        return value.detach().tolist()
    if isinstance(value, Mapping):
        return {plain(key): plain(content) for key, content in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(content) for content in value)
    return value


class Rule(Generic[T]):
    """What an argument has to be.

    Args:
        words: What is expected, as it ends the sentence "... must be".
        hint: The type, with pydantic's constraints.
        scalars: Whether numbers of numpy and torch are to become those of Python.
    """

    def __init__(self, words: str, hint: Any, *, scalars: bool = True) -> None:
        self.words = words
        self.hint = hint
        self.scalars = scalars

    @functools.cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.hint, config=ConfigDict(strict=True, allow_inf_nan=False))

    def check(self, name: str, value: Any) -> T:
        """Return the value, numbers of numpy and torch as those of Python.

        Args:
            name: What the argument is called.
            value: What was given for it.

        Raises:
            ArgumentTypeError: If the value is of another type.
            ArgumentValueError: If it is of the right type and not allowed.
        """
        try:
            return self._adapter.validate_python(plain(value) if self.scalars else value)
        except ValidationError as error:
            raise self._error(name, value, error) from None
        except RecursionError:
            raise ArgumentTypeError(f"{name} must be {self.words}; found something that holds itself.") from None

    def _error(self, name: str, value: Any, error: ValidationError) -> Exception:
        found = error.errors(include_url=False)
        why = next((str(e["ctx"]["error"]) for e in found if e["type"] == "value_error"), "")
        text = f"{name} must be {self.words}; found {shown(value)}"
        if all(_of_type(e["type"], e["input"]) for e in found):
            return ArgumentTypeError(f"{text} ({type(value).__name__}).")
        return ArgumentValueError(f"{text}{f' ({why})' if why else ''}.")


def _of_type(error: str, found: Any) -> bool:
    """Whether an error of pydantic is one of the type, and not of the value."""
    literal = error == "literal_error" and not isinstance(found, str)
    return literal or error.endswith(("_type", "_str")) or error == "is_instance_of"


def shown(value: Any) -> str:
    """The value as it would be written in Python, in one line that is not too long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    try:
        return " ".join(short.repr(value).split())
    except Exception:
        # whatever a class of the user's raises in its repr
        return f"a {type(value).__name__}"


def optional(rule: Rule[T]) -> Rule[T | None]:
    """The rule of an argument that may be ``None``, too."""
    return Rule(f"{rule.words}, or None", _union(rule.hint, None))


def either(words: str, *rules: Rule[Any]) -> Rule[Any]:
    """The rule of an argument that has to follow one of several."""
    return Rule(words, _union(*(rule.hint for rule in rules)))


def _union(*hints: Any) -> Any:
    return functools.reduce(operator.or_, hints)


def choice(*values: str) -> Rule[Any]:
    """The rule of an argument that is one of some words."""
    return Rule(f"one of {', '.join(map(repr, values))}", Literal[values])


def instance(words: str, *classes: type) -> Rule[Any]:
    """The rule of an argument that is an object of one of some classes."""
    return Rule(words, Annotated[Any, GetPydanticSchema(lambda *_: core_schema.is_instance_schema(classes))])


def sequence_of(words: str, rule: Rule[T], *, empty: bool = True) -> Rule[tuple[T, ...]]:
    """The rule of an argument that is a list or another sequence, but no text; a tuple is kept of it."""
    length = Field(min_length=0 if empty else 1)
    return Rule(words, Annotated[Sequence[rule.hint], length, AfterValidator(tuple)])  # type: ignore[name-defined]


def pair(words: str, hint: Any) -> Rule[tuple[Any, Any]]:
    """The rule of an argument that is a list or tuple of two values of a type; a tuple is kept of it."""
    return Rule(words, Annotated[Sequence[hint], Field(min_length=2, max_length=2), AfterValidator(tuple)])


def mapping_of(words: str, key: Rule[Any], value: Rule[T], *, empty: bool = True) -> Rule[dict[str, T]]:
    """The rule of an argument that is a mapping; a dict is kept of it."""
    length = Field(min_length=0 if empty else 1)
    return Rule(words, Annotated[dict[key.hint, value.hint], length])  # type: ignore[name-defined]


def passing(words: str, hint: Any, check: Callable[[Any], Any]) -> Rule[Any]:
    """The rule of an argument that a function returns, or raises ValueError for."""
    return Rule(words, Annotated[hint, AfterValidator(check)])


def count(least: int, most: int = BIGGEST) -> Rule[int]:
    """The rule of an integer in a range."""
    words = f"of {least} or more" if most == BIGGEST else f"from {least} to {most:,}"
    return Rule(f"an integer {words}", Annotated[int, Field(ge=least, le=most)])


def _path(value: str | os.PathLike[str]) -> Path:
    text = os.fspath(value)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError("it is empty, or holds a character that no path can")
    return Path(text)


def _readable_again(value: Iterable[Any]) -> Iterable[Any]:
    if isinstance(value, Iterator):
        raise ValueError("an iterator can be read only once; give a DataLoader, or a list")
    return value


def _expression(value: str) -> str:
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{shown(value)} is no regular expression: {error}") from None
    return value


FLAG: Rule[bool] = Rule("True or False", bool)
TEXT: Rule[str] = Rule("text that is not empty", Annotated[str, StringConstraints(min_length=1)])
PATH: Rule[Path] = passing("a path, as text or pathlib.Path", str | InstanceOf[os.PathLike], _path)
INTEGER: Rule[int] = Rule("an integer of 64 bits", Annotated[int, Field(ge=-BIGGEST - 1, le=BIGGEST)])
COUNT = count(1)
NATURAL = count(0)
CUTS = count(1, MOST_CUTS)
RATIO: Rule[float] = Rule("a number strictly between 0 and 1", Annotated[float, Field(gt=0, lt=1)])
FRACTION: Rule[float] = Rule("a number from 0 to 1", Annotated[float, Field(ge=0, le=1)])
POSITIVE: Rule[float] = Rule("a finite number above 0", Annotated[float, Field(gt=0)])
NOT_NEGATIVE: Rule[float] = Rule("a finite number of 0 or more", Annotated[float, Field(ge=0)])
BATCHES: Rule[Any] = Rule(
    "an iterable of batches that can be read several times",
    Annotated[InstanceOf[Iterable], AfterValidator(_readable_again)],
    scalars=False,
)
EXPRESSION: Rule[str] = passing("a regular expression", str, _expression)


def check_fields(owner: Any, rules: Mapping[str, Rule[Any]]) -> None:
    """Check fields of a dataclass, frozen or not, and keep what their rules return.

    Args:
        owner: The dataclass instance.
        rules: The rule of every field.

    Raises:
        ArgumentTypeError: If a value is of another type.
        ArgumentValueError: If one is of the right type and not allowed.
    """
    for name, rule in rules.items():
        object.__setattr__(owner, name, rule.check(name, getattr(owner, name)))
