"""Union of disjoint masks: every entry is kept, times the weight of its vector (LoTTO, arXiv 2406.16797, section 3)."""

from typing import Literal, TypeAlias

import numpy as np

from taskvec_formats import SparseTensor

from ...errors import MergeError
from ...vectors.align import Aligned

OnOverlap: TypeAlias = Literal["error", "sum", "mean", "larger", "first"]


def disjoint(vectors: Aligned, *, on_overlap: OnOverlap = "error") -> SparseTensor:
    """The union of the weighted entries, including explicit zeros.

    Args:
        vectors: The vectors in one range of a tensor.
        on_overlap: The result at a position that several vectors contain. "error" raises; "sum" adds the weighted
            values; "mean" divides that sum by the number of vectors that contain the position; "larger" takes the
            weighted value of largest magnitude, the first of equal ones; "first" takes the weighted value of the first
            vector.

    Raises:
        MergeError: Several vectors contain the same position, and `on_overlap` is "error".
    """
    everywhere = vectors.zeros() == 0
    shared = sum(len(part.places) for part in vectors.parts) - len(vectors.indices)
    if on_overlap == "error" and shared:
        raise MergeError(f"{shared} positions are held by more than one vector, so the masks are not disjoint")
    if on_overlap in ("error", "sum") or not shared:
        return vectors.result(vectors.total(), everywhere)
    if on_overlap == "mean":
        return vectors.result(vectors.total() / vectors.count(), everywhere)
    chosen = vectors.zeros()
    if on_overlap == "larger":
        for part in vectors.parts:
            weighted = vectors.weighted(part)
            larger = abs(weighted) > abs(chosen)
            chosen[larger] = weighted[larger]
    else:
        for part in reversed(vectors.parts):
            chosen[part.places] = part.values * np.float32(part.weight)
    return vectors.result(chosen, everywhere)
