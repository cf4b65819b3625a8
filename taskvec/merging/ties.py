"""TIES without its trim: elect a sign at each position, then average the values that agree with it.

Yadav et al., "TIES-Merging", arXiv 2306.01708, Algorithm 1, steps 2 and 3. Step 1, trimming to the largest 20 %, is
left out for vectors that are sparse already, as LoTA does when it merges by TIES (arXiv 2406.16797, section 4).
"""

from collections.abc import Sequence

import numpy as np

from taskvec_formats import SparseTensor

from .align import align


def ties(tensors: Sequence[SparseTensor], weights: Sequence[float]) -> SparseTensor:
    """Sign election by mass and disjoint mean.

    elected γ = sgn(Σ wᵢ·τᵢ); result = mean of the wᵢ·τᵢ whose sign is γ. The mean counts agreeing vectors, not weights,
    so that a position held by one vector alone keeps its weighted value: normalising by the weights would divide them
    out again. Where the masses cancel exactly no sign is elected and the entry is dropped.
    """
    aligned = align(tensors, weights)
    elected = np.sign(aligned.total())
    total, agreeing = aligned.zeros(), aligned.zeros()
    for places, values in aligned.parts:
        agrees = np.sign(values) == elected[places]
        total[places[agrees]] += values[agrees]
        agreeing[places[agrees]] += 1
    kept = elected != 0
    return aligned.result(np.divide(total, agreeing, where=kept, out=aligned.zeros()), kept)
