"""Paired bootstrap intervals: the same windows, sentences or images under two models, drawn again and again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

DRAWS = 4000
LEVEL = 0.95


def paired_interval(
    first: Sequence[float], second: Sequence[float], statistic: Callable[[Tensor], Tensor] = lambda means: means
) -> tuple[float, float, float]:
    """A statistic of the mean difference ``first - second`` of paired values, with its 95% bootstrap interval.

    Args:
        first: One value for every unit (a window, a sentence) under one model.
        second: The values of the same units under the other model.
        statistic: What is made of the mean differences, elementwise; by default nothing.

    Returns:
        The statistic on all units, and the lower and the upper end of its percentile interval.

    Reference: Efron and Tibshirani, An Introduction to the Bootstrap, 1993.
    """
    differences = torch.tensor(first, dtype=torch.float64) - torch.tensor(second, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(differences), (DRAWS, len(differences)), generator=generator)
    means = statistic(differences[drawn].mean(1))
    low, high = torch.quantile(means, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)).tolist()
    return statistic(differences.mean()).item(), low, high


def perplexity(losses: Sequence[float]) -> float:
    """Perplexity of windows of equal length from the mean negative log-likelihood a token of each."""
    return math.exp(sum(losses) / len(losses))


def perplexity_ratio(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Perplexity under one model over that under another, with its 95% interval over windows of equal length."""
    return paired_interval(first, second, torch.exp)


def shown_perplexity_ratio(first: Sequence[float], second: Sequence[float]) -> str:
    """What :func:`perplexity_ratio` gives, for a table."""
    return "{:.3f} ({:.3f} to {:.3f})".format(*perplexity_ratio(first, second))


def shown_speedup(ratio: Mapping[str, float]) -> str:
    """How many times faster something is, for a table.

    Args:
        ratio: ``median``, ``low`` and ``high`` of its time over that of the other.
    """
    return f"{1 / ratio['median']:.2f}x ({1 / ratio['high']:.2f} to {1 / ratio['low']:.2f})"


def mean_over_runs(runs: Sequence[Sequence[float]]) -> list[float]:
    """The mean of every unit over several runs (calibration seeds)."""
    return torch.tensor(runs, dtype=torch.float64).mean(0).tolist()
