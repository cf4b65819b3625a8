"""Masks that do not meet: every entry is kept, times its vector's weight (LoTTO, arXiv 2406.16797, section 3)."""

from collections.abc import Sequence

import numpy as np

from taskvec_formats import SparseTensor

from ..errors import MergeError
from .align import align


def disjoint(tensors: Sequence[SparseTensor], weights: Sequence[float]) -> SparseTensor:
    """The union of the entries, explicit zeros included. Raises MergeError where two tensors hold one position."""
    aligned = align(tensors, weights)
    shared = sum(len(tensor) for tensor in tensors) - len(aligned.indices)
    if shared:
        raise MergeError(f"{shared} positions are held by more than one vector, so the masks are not disjoint")
    return aligned.result(aligned.total(), np.ones(len(aligned.indices), bool))
