"""Times a cut in turn with the model, and says how far the times can be trusted."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from lit_prune.budgets.latency import Clock, time_plans
from lit_prune.budgets.workloads import Workload
from lit_prune.plan import PruningPlan

_LEVEL = 0.95
# pairs of times between two looks at the interval: the fewest whose range holds the median with 95%
_PAIRS = 6
_MOST_PAIRS = 60
# an interval no wider than this, as a part of the median, says enough
_NARROW = 0.04
# and one that a prediction misses by no more than this confirms it
_CLOSE = 0.01


@dataclass(frozen=True)
class Ratio:
    """How long a cut model takes, as a part of what the dense one takes.

    Args:
        median: Of pairs that were timed in turn.
        low: Lower end of its 95% interval.
        high: Upper end.
        pairs: Number of pairs.
    """

    median: float
    low: float
    high: float
    pairs: int

    @property
    def narrow(self) -> bool:
        """Whether the interval is narrow enough to correct predictions by."""
        return self.high - self.low <= _NARROW * self.median

    def __str__(self) -> str:
        return f"{self.median:.3g} times ({self.low:.3g} to {self.high:.3g} over {self.pairs} pairs)"

    def nearest(self, expected: float) -> float:
        """The ratio of the interval that is nearest to an expected one.

        The expected one if it all but lies within, or if there are too few pairs, and too different ones, to say.
        """
        if self.pairs < _PAIRS and not self.narrow:
            return expected
        nearest = min(max(expected, self.low), self.high)
        return expected if abs(nearest / expected - 1) <= _CLOSE else nearest


def ratio_of_pairs(ratios: Sequence[float]) -> Ratio:
    """The median of some ratios with its 95% interval, which holds whatever their distribution is.

    Args:
        ratios: One for each pair of times. Of fewer than 6, the interval is all of their range, and holds with less.

    Reference: David and Nagaraja, Order Statistics, 2003, section 7.1: the interval between the k-th smallest and the k-th
    largest of n values holds the median but for twice the chance of fewer than k heads in n throws.
    """
    ordered = sorted(ratios)
    number = len(ordered)
    place, outside = 0, 2 * 0.5**number
    while place < (number - 1) // 2:
        outside += 2 * math.comb(number, place + 1) * 0.5**number
        if outside > 1 - _LEVEL:
            break
        place += 1
    median = (ordered[(number - 1) // 2] + ordered[number // 2]) / 2
    return Ratio(median, ordered[place], ordered[number - 1 - place], number)


def time_trial(
    workload: Workload, phase: str, plan: PruningPlan, until: float, clock: Clock = time.perf_counter
) -> Ratio:
    """Time a cut in turn with the model until the interval is narrow, 60 pairs are timed, or time is over.

    When it ends does not depend on what is expected, as an interval that is looked at until it excludes something excludes
    anything in the end.

    Args:
        workload: The model, the same after as before.
        phase: The phase.
        plan: The cut.
        until: The ``time.perf_counter()`` after which no further pairs are timed; there are two at least.
        clock: As for :func:`lit_prune.budgets.latency.time_plans`.
    """
    ratios: list[float] = []
    while True:
        left = until - time.perf_counter()
        seconds = time_plans(workload, phase, {"dense": None, "cut": plan}, left, rounds=_PAIRS, clock=clock)
        ratios += [c / d for c, d in zip(seconds["cut"], seconds["dense"], strict=True)]
        ratio = ratio_of_pairs(ratios)
        if ratio.narrow or len(ratios) >= _MOST_PAIRS or time.perf_counter() >= until:
            return ratio
