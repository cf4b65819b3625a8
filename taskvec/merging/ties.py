"""TIES: elect a sign at each position, then average the values that agree with it.

Yadav et al., "TIES-Merging", arXiv 2306.01708, Algorithm 1, steps 2 and 3; step 1 is trim.py.
"""

from taskvec_formats import SparseTensor

from ..align import Aligned, Array, Part
from .dialects import DIALECTS

ELECTIONS = ("mass", "frequency")


def ties(vectors: Aligned, *, dialect: str = "reference", elect: str = "mass", normalize: bool = True) -> SparseTensor:
    """Sign election and disjoint mean.

    Elected is γ = sgn(Σ wᵢ·τᵢ), by "mass", or sgn(Σ sgn(wᵢ·τᵢ)), by "frequency"; the result is the mean of the wᵢ·τᵢ
    whose sign is γ. The mean counts agreeing vectors, not weights, so that a position held by one vector alone keeps
    its weighted value. `dialect` says what other programs do instead (dialects.py).
    normalize: divide; else the result is the sum of those that agree.
    """
    rules = DIALECTS[dialect]

    def voice(part: Part) -> Array:
        return part.weighted if rules.weighted_election else part.values

    masses = vectors.zeros()
    for part in vectors.parts:
        said = voice(part)
        masses[part.places] += said if elect == "mass" else (said > 0) * 1.0 - (said < 0) * 1.0
    positive, negative = masses >= 0 if rules.zero_is_positive else masses > 0, masses < 0
    total, divisor = vectors.zeros(), vectors.zeros()
    for part in vectors.parts:
        said = voice(part)
        agrees = (said > 0) & positive[part.places] | (said < 0) & negative[part.places]
        places = part.places[agrees]
        total[places] += part.weighted[agrees]
        divisor[places] += part.weight if rules.by_weight else 1
    if normalize:
        divisor[divisor == 0] = 1
        total = total / divisor
    return vectors.result(total)
