"""A mean over held-out examples, and how far another draw of examples would move it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean, and its standard error, None where there is only one example."""

    value: float
    standard_error: float | None


def estimate(sums: Sequence[float], counts: Sequence[int] | None = None) -> Estimate:
    """The ratio L = Σ sums / Σ counts over n examples; without counts each counts once and L is the mean.

    The standard error is the linearised one of a ratio of sums, √(n/(n−1) · Σ (sum − L·count)²) / Σ counts; of a mean
    that is the sample standard deviation / √n.
    """
    counts = [1] * len(sums) if counts is None else counts
    n, total = len(sums), sum(counts)
    value = math.fsum(sums) / total
    if n == 1:
        return Estimate(value, None)
    squares = math.fsum((each - value * count) ** 2 for each, count in zip(sums, counts, strict=True))
    return Estimate(value, math.sqrt(n / (n - 1) * squares) / total)
