"""Task arithmetic, Σ wᵢ·τᵢ (Ilharco et al., arXiv 2212.04089, section 2), or divided by Σ wᵢ, the average."""

import numpy as np

from taskvec_formats import SparseTensor

from ...errors import MergeError
from ...vectors.align import Aligned


def linear(vectors: Aligned, *, normalize: bool = False) -> SparseTensor:
    """Σ wᵢ·τᵢ at every position that any vector holds; entries that cancel to zero are dropped.

    Args:
        vectors: Of one range of a tensor.
        normalize: Whether to divide by Σ wᵢ, of all vectors, whether they hold a position or not.

    Raises:
        MergeError: Σ wᵢ is zero.
    """
    if not normalize:
        return vectors.result(vectors.total())
    weight = np.float32(0)
    for part in vectors.parts:
        weight += np.float32(part.weight)
    if abs(weight) < 1e-8:
        raise MergeError("the weights add up to 0, so there is no average")
    return vectors.result(vectors.total() / float(weight))
