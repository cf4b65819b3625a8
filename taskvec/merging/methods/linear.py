"""Task arithmetic, Σ wᵢ·τᵢ (Ilharco et al., arXiv 2212.04089, section 2), and the weighted average, Σ wᵢ·τᵢ / Σ wᵢ."""

import numpy as np

from taskvec_formats import SparseTensor

from ...errors import MergeError
from ...vectors.align import Aligned


def linear(vectors: Aligned, *, normalize: bool = False) -> SparseTensor:
    """The weighted sum Σ wᵢ·τᵢ. Entries that cancel to zero are dropped.

    Args:
        vectors: The vectors in one range of a tensor.
        normalize: Whether to divide by Σ wᵢ. The sum is over all vectors, whether they contain a position or not.

    Raises:
        MergeError: `normalize` is given and Σ wᵢ is zero.
    """
    if not normalize:
        return vectors.result(vectors.total())
    weight = np.float32(0)
    for part in vectors.parts:
        weight += np.float32(vectors.factor(part))
    weight = vectors.rounded(weight)
    if abs(weight) < 1e-8:
        raise MergeError("the weights add up to 0, so there is no average")
    return vectors.result(vectors.rounded(vectors.total() / vectors.number(float(weight))))
