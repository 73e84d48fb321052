"""Amounts as people write them: ``"1.5x"``, ``"80%"``, ``0.8``, ``"6GB"``, ``"120ms"``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from numbers import Real

from lit_prune.arguments import shown
from lit_prune.errors import ArgumentTypeError, ArgumentValueError

_COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12, "P": 1e15}
_BYTES = {"B": 1.0} | {
    f"{prefix}{i}B": (1024.0 if i else 1000.0) ** power
    for power, prefix in enumerate("KMGT", start=1)
    for i in ("", "i")
}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_NUMBER = re.compile(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z%]*)\s*")

COUNT_UNITS, BYTE_UNITS, TIME_UNITS = "count", "bytes", "seconds"
_UNITS = {COUNT_UNITS: _COUNTS, BYTE_UNITS: _BYTES, TIME_UNITS: _SECONDS}
_EXAMPLES = {COUNT_UNITS: "'100M' or 1e8", BYTE_UNITS: "'6GB' or '5.5GiB'", TIME_UNITS: "'120ms'"}


@dataclass(frozen=True)
class Amount:
    """An upper limit, absolute or as a fraction of what the dense model takes.

    Args:
        value: The limit, in the base unit or as a fraction.
        relative: Whether it is a fraction.
    """

    value: float
    relative: bool

    def of(self, dense: float) -> float:
        """The limit in the base unit, for a dense model that takes ``dense``."""
        return self.value * dense if self.relative else self.value


def parse_amount(name: str, given: object, units: str) -> Amount:
    """Parse an amount.

    Args:
        name: What the argument is called.
        given: Text, or a number of Python or NumPy: below 1 a fraction of dense, above it absolute. ``"1.5x"`` is a 1.5th of
            dense, ``"80%"`` and ``"0.8"`` are fractions.
        units: Which units may follow a number: ``"count"`` (K, M, B or G, T), ``"bytes"`` (B, kB ... TiB) or ``"seconds"``
            (s, ms, us). A time always needs one.

    Raises:
        ArgumentTypeError: If it is neither text nor a number.
        ArgumentValueError: If it cannot be read, or asks for no less than dense.
    """
    wanted = f"{name} must be less than dense, like '1.5x', '80%' or 0.8, or absolute, like {_EXAMPLES[units]}"
    if isinstance(given, bool) or not isinstance(given, (str, Real)):
        raise ArgumentTypeError(f"{wanted}; found {shown(given)} ({type(given).__name__}).")
    try:
        match = _NUMBER.fullmatch(given if isinstance(given, str) else repr(float(given)))
        number, unit = (float(match[1]), match[2]) if match else (math.nan, "")
    except (ValueError, OverflowError):
        number, unit = math.nan, ""
    known = {u.lower(): scale for u, scale in _UNITS[units].items()}
    bare_time = units == TIME_UNITS and unit == "" and number >= 1
    if not (number > 0 and math.isfinite(number)) or bare_time or unit.lower() not in {*known, "x", "%", ""}:
        raise ArgumentValueError(f"{wanted}; found {shown(given)}.")
    if unit.lower() == "x":
        amount = Amount(1 / number, True)
    elif unit == "%":
        amount = Amount(number / 100, True)
    elif unit == "" and number <= 1:
        amount = Amount(number, True)
    else:
        amount = Amount(number * known.get(unit.lower(), 1.0), False)
    if amount.relative and amount.value >= 1:
        raise ArgumentValueError(f"{wanted}; found {shown(given)}, which is what the dense model takes, or more.")
    return amount


def format_amount(value: float, units: str) -> str:
    """A value with a unit that suits its size."""
    if units == TIME_UNITS:
        return f"{value * 1e3:,.2f} ms" if value < 1 else f"{value:,.3f} s"
    prefixes = ["", "k", "M", "G", "T", "P"]
    power = min(int(math.log10(value) // 3), 5) if value >= 1 else 0
    return f"{value / 1000**power:,.4g} {prefixes[power]}{'B' if units == BYTE_UNITS else ''}".rstrip()
