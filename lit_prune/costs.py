"""Seconds and peak memory of the phases of pruning."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class PhaseCost:
    """What one phase took.

    Args:
        seconds: Wall-clock time, of all iterations together.
        peak_bytes: The highest use of memory so far when the phase ended: of PyTorch's allocator on a CUDA device, since the
            process began or somebody last reset that counter; of the process on a CPU.
    """

    seconds: float = 0.0
    peak_bytes: int = 0


class Costs:
    """Measures phases, each by name; no counter is reset.

    As counters only rise, the first phase that shows a peak is the one that needed it.

    Args:
        watch: Gives a context for a phase of that name, in which it is done; that of a progress bar, for instance.

    Attributes:
        phases: By name, in the order in which they began, what each took.
    """

    def __init__(self, watch: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext) -> None:
        self.phases: dict[str, PhaseCost] = {}
        self._watch = watch

    @contextlib.contextmanager
    def phase(self, name: str, device: torch.device) -> Iterator[None]:
        """Add what is done within to a phase, also if it ends in an error.

        Args:
            name: Name of the phase.
            device: Where it computes.
        """
        cost = self.phases.setdefault(name, PhaseCost())
        start = time.perf_counter()
        try:
            with self._watch(name):
                yield
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        finally:
            cost.seconds += time.perf_counter() - start
            cost.peak_bytes = max(cost.peak_bytes, peak_bytes(device))

    def numbers(self) -> dict[str, float]:
        """Return the costs as a flat mapping: ``"PHASE_seconds"`` and ``"PHASE_peak_bytes"``, and ``"total_..."`` of all."""
        flat: dict[str, float] = {}
        for name, cost in self.phases.items():
            flat |= {f"{name}_seconds": cost.seconds, f"{name}_peak_bytes": float(cost.peak_bytes)}
        if self.phases:
            flat["total_seconds"] = sum(cost.seconds for cost in self.phases.values())
            flat["total_peak_bytes"] = float(max(cost.peak_bytes for cost in self.phases.values()))
        return flat


def peak_bytes(device: torch.device) -> int:
    """Return the highest use of memory so far, see :class:`PhaseCost`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # in KiB, in bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cost_rows(numbers: Mapping[str, float]) -> list[list[str]]:
    """Return the costs of :meth:`Costs.numbers` as text: a heading, and a row for each phase.

    Args:
        numbers: The costs by name.
    """
    rows = [["", "seconds", "peak memory so far, MB"]]
    for name, seconds in numbers.items():
        if name.endswith(_SECONDS):
            phase = name.removesuffix(_SECONDS)
            peak = numbers.get(f"{phase}_peak_bytes")
            rows.append([phase, f"{seconds:,.1f}", "" if peak is None else f"{peak / 1e6:,.0f}"])
    return rows


_SECONDS = "_seconds"
