"""TIES: elect a sign for each position, then average the values that agree with it.

Yadav et al., "TIES-Merging", arXiv 2306.01708, Algorithm 1, steps 2 and 3. Step 1 is trim.py.
"""

from typing import Literal, TypeAlias

import numpy as np

from taskvec_formats import SparseTensor

from ...vectors.align import Aligned
from .dialects import DIALECTS, DialectName

Election: TypeAlias = Literal["mass", "frequency"]


def ties(
    vectors: Aligned, *, dialect: DialectName = "reference", elect: Election = "mass", normalize: bool = True
) -> SparseTensor:
    """Sign election and disjoint mean.

    The elected sign is γ = sgn(Σ wᵢ·τᵢ) for "mass" and γ = sgn(Σ sgn(wᵢ·τᵢ)) for "frequency". The result is the mean of
    the wᵢ·τᵢ whose sign is γ. The mean is over the number of agreeing vectors, not over their weights, so a position of
    a single vector keeps its weighted value.

    Args:
        vectors: The vectors in one range of a tensor.
        dialect: A name in DIALECTS, which describes how other programs deviate.
        elect: "mass" or "frequency".
        normalize: Whether to divide. If not, the result is the sum of the agreeing values.
    """
    rules = DIALECTS[dialect]
    weighted = [vectors.weighted(part) for part in vectors.parts]
    votes = weighted if rules.weighted_election else [vectors.values(part) for part in vectors.parts]
    mass = vectors.zeros()
    for vote in votes:
        mass += vote if elect == "mass" else (vote > 0) * np.float32(1) - (vote < 0) * np.float32(1)
    mass = vectors.rounded(mass)
    up, down = mass >= 0 if rules.zero_is_positive else mass > 0, mass < 0
    total, divisor = vectors.zeros(), vectors.zeros()
    for part, value, vote in zip(vectors.parts, weighted, votes, strict=True):
        agrees = (vote > 0) & up | (vote < 0) & down
        total += value * agrees
        divisor += np.float32(vectors.factor(part)) * agrees if rules.by_weight else agrees
    total, divisor = vectors.rounded(total), vectors.rounded(divisor)
    if normalize:
        total = vectors.rounded(total / (divisor + (divisor == 0)))
    return vectors.result(total)
