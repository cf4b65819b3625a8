"""Means over held-out examples, and their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error.

    Attributes:
        value: The mean.
        standard_error: Its standard error, or None if there is only one example.
    """

    value: float
    standard_error: float | None

    def __str__(self) -> str:
        spread = "" if self.standard_error is None else f" ± {self.standard_error:.3f}"
        return f"{self.value:.3f}{spread}"


@dataclass(frozen=True)
class Scores:
    """The values of a metric, one per example. The metric is Σ sums / Σ counts.

    Attributes:
        sums: One sum per example.
        counts: One count per example; 1 each for a mean.
    """

    sums: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def estimate(self) -> Estimate:
        """The metric with its standard error."""
        return estimate(self.sums, self.counts)

    def __add__(self, other: Scores) -> Scores:
        return Scores(self.sums + other.sums, self.counts + other.counts)

    def minus(self, other: Scores) -> Estimate:
        """Return the difference from the metric of another model on the same examples, with its standard error."""
        return estimate([a - b for a, b in zip(self.sums, other.sums, strict=True)], self.counts)


def estimate(sums: Sequence[float], counts: Sequence[int] | None = None) -> Estimate:
    """The ratio L = Σ sums / Σ counts over n examples.

    The standard error is the linearised one of a ratio of sums, √(n/(n−1) · Σ (sum − L·count)²) / Σ counts. For a mean
    it is the sample standard deviation / √n.

    Args:
        sums: One sum per example.
        counts: One count per example. None means 1 each, so that L is the mean.

    Returns:
        L and its standard error.
    """
    counts = [1] * len(sums) if counts is None else counts
    n, total = len(sums), sum(counts)
    value = math.fsum(sums) / total
    if n == 1:
        return Estimate(value, None)
    squares = math.fsum((each - value * count) ** 2 for each, count in zip(sums, counts, strict=True))
    return Estimate(value, math.sqrt(n / (n - 1) * squares) / total)
