"""TIES: elect a sign at each position, then average the values that agree with it.

Yadav et al., "TIES-Merging", arXiv 2306.01708, Algorithm 1, steps 2 and 3; step 1 is trim.py.
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

    Elected is γ = sgn(Σ wᵢ·τᵢ), by "mass", or sgn(Σ sgn(wᵢ·τᵢ)), by "frequency"; the result is the mean of the wᵢ·τᵢ
    whose sign is γ. The mean counts agreeing vectors, not weights, so that a position held by one vector alone keeps
    its weighted value.

    Args:
        vectors: Of one range of a tensor.
        dialect: A name in DIALECTS, which says what other programs do instead.
        elect: "mass" or "frequency".
        normalize: Whether to divide. Without it the result is the sum of the values that agree.
    """
    rules = DIALECTS[dialect]
    weighted = [vectors.weighted(part) for part in vectors.parts]
    voices = weighted if rules.weighted_election else [vectors.values(part) for part in vectors.parts]
    mass = vectors.zeros()
    for voice in voices:
        mass += voice if elect == "mass" else (voice > 0) * np.float32(1) - (voice < 0) * np.float32(1)
    up, down = mass >= 0 if rules.zero_is_positive else mass > 0, mass < 0
    total, divisor = vectors.zeros(), vectors.zeros()
    for part, value, voice in zip(vectors.parts, weighted, voices, strict=True):
        agrees = (voice > 0) & up | (voice < 0) & down
        total += value * agrees
        divisor += np.float32(part.weight) * agrees if rules.by_weight else agrees
    if normalize:
        total = total / (divisor + (divisor == 0))
    return vectors.result(total)
