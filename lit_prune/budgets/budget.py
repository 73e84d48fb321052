"""What a pruned model may cost at most, as a user says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from lit_prune.arguments import COUNT, PATH, choice, optional, shown
from lit_prune.budgets.amounts import BYTE_UNITS, COUNT_UNITS, TIME_UNITS, Amount, parse_amount
from lit_prune.errors import ArgumentTypeError, ArgumentValueError

PARAMS, FLOPS, MEMORY, LATENCY = "params", "flops", "memory", "latency"
UNITS = {PARAMS: COUNT_UNITS, FLOPS: COUNT_UNITS, MEMORY: BYTE_UNITS, LATENCY: TIME_UNITS}
PREFILL, DECODE, TRAIN = "prefill", "decode", "train"
PHASES = (PREFILL, DECODE, TRAIN)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Budget:
    """Upper limits of what the pruned model takes; all that are given are met.

    Each is a part of what the dense model takes (``"1.5x"`` is a 1.5th; ``0.8`` or ``"80%"`` a fraction) or absolute
    (``"6GB"``, ``"120ms"``, ``100e6``). A model that token ids alone are not enough for (a convolutional network, CLIP) is
    run on one calibration batch as it comes; ``batch`` and ``length`` do not apply to it, and it has no cache.

    Args:
        params: Parameters; tied ones count once.
        flops: Floating-point operations of one forward pass over ``batch`` sequences of ``length`` tokens, attention
            included, as :class:`torch.utils.flop_counter.FlopCounterMode` counts them: two for a multiply-add.
        memory: Bytes of the weights and of the cache, of keys and values or states, of ``batch`` sequences of ``length`` tokens.
        latency: Seconds of one forward pass that fills the cache with ``batch`` sequences of ``length`` tokens, the last
            logits only, as ``generate`` begins (``"prefill"``); or by phase: ``{"prefill": "1.5x", "decode": "1.3x"}``.
            ``"decode"`` is one more token for each sequence, with ``length`` tokens in the cache; ``"train"`` a forward and
            backward pass, without the optimizer's step.
        batch: Sequences.
        length: Tokens of each sequence, of an encoder and of a decoder.
        dtype: What weights and cache are held in where the model is served, for ``memory``: ``"float32"``, ``"bfloat16"`` or
            ``"float16"``. That of the weights if ``None``.
        latency_table: A file with the times of a model of these shapes, measured on the machine that the model is for
            (:func:`lit_prune.measure_latency`). They are measured here if ``None``, and cached.

    Raises:
        ArgumentTypeError: If a value is of another type.
        ArgumentValueError: If one cannot be read, or none is given.

    Example::

        PruningConfig(budget=Budget(latency="1.5x", memory="6GB", length=4096))
    """

    params: str | float | None = None
    flops: str | float | None = None
    memory: str | float | None = None
    latency: str | float | Mapping[str, str | float] | None = None
    batch: int = 1
    length: int = 512
    dtype: str | None = None
    latency_table: str | Path | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        object.__setattr__(self, "batch", COUNT.check("budget.batch", self.batch))
        object.__setattr__(self, "length", COUNT.check("budget.length", self.length))
        optional(choice(*DTYPES)).check("budget.dtype", self.dtype)
        path = optional(PATH).check("budget.latency_table", self.latency_table)
        object.__setattr__(self, "latency_table", None if path is None else str(path))
        if isinstance(self.latency, Mapping):
            object.__setattr__(self, "latency", dict(self.latency))
            for phase in self.latency:
                choice(*PHASES).check("a phase of budget.latency", phase)
        if not self.limits:
            raise ArgumentValueError(f"A budget must limit one of {', '.join(UNITS)}; found none.")

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases that latency is limited of."""
        return tuple(name.partition(".")[2] for name in self.limits if name.startswith(LATENCY))

    @property
    def limits(self) -> dict[str, Amount]:
        """The limits by what they are of: ``"params"``, ``"flops"``, ``"memory"``, ``"latency.PHASE"``."""
        return {name: parse_amount(f"budget.{name}", given, units_of(name)) for name, given in self.asked.items()}

    @property
    def asked(self) -> dict[str, str | float]:
        """The limits as they were written, by what they are of."""
        latency = self.latency if isinstance(self.latency, Mapping) else {PREFILL: self.latency}
        given = {name: getattr(self, name) for name in (PARAMS, FLOPS, MEMORY)}
        given |= {f"{LATENCY}.{phase}": value for phase, value in latency.items()}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def served_as(self) -> torch.dtype | None:
        """What ``dtype`` names."""
        return None if self.dtype is None else getattr(torch, self.dtype)

    @classmethod
    def of(cls, given: Budget | str | Mapping[str, Any]) -> Budget:
        """A budget from text like ``"latency=1.5x,memory=6GB,length=4096"``, or from a mapping of its fields.

        ``latency.decode=1.3x`` names a phase.

        Raises:
            ArgumentTypeError: If it is neither.
            ArgumentValueError: If it names something unknown, or twice.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, str):
            given = _from_text(given)
        if not isinstance(given, Mapping):
            raise ArgumentTypeError(
                f"budget must be a lit_prune.Budget, a mapping of its fields, or text like 'latency=1.5x,memory=6GB'; found"
                f" {shown(given)} ({type(given).__name__})."
            )
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise ArgumentValueError(f"budget has the fields {', '.join(known)}; found {shown(name)}.")
        return cls(**given)


def units_of(name: str) -> str:
    """The units of a limit, see :func:`lit_prune.budgets.amounts.parse_amount`."""
    return UNITS[name.partition(".")[0]]


def _from_text(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        name, _, phase = name.partition(".")
        if not equals or not value or (phase and name != LATENCY):
            raise ArgumentValueError(f"budget must be text like 'latency=1.5x,memory=6GB'; found {shown(text)}.")
        parsed: Any = int(value) if name in ("batch", "length") and value.isdecimal() else value
        if name == LATENCY:
            parsed, phase = found.get(LATENCY, {}), phase or PREFILL
            if phase in parsed:
                raise ArgumentValueError(f"budget names latency.{phase} twice: {shown(text)}.")
            parsed = {**parsed, phase: value}
        elif name in found:
            raise ArgumentValueError(f"budget names {name} twice: {shown(text)}.")
        found[name] = parsed
    return found
