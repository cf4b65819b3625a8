"""Task arithmetic: the weighted sum, Σ wᵢ·τᵢ (Ilharco et al., arXiv 2212.04089, section 2)."""

from collections.abc import Sequence

from taskvec_formats import SparseTensor

from .align import align


def linear(tensors: Sequence[SparseTensor], weights: Sequence[float]) -> SparseTensor:
    """Σ wᵢ·τᵢ at every position that any holds; entries that cancel to zero are dropped."""
    aligned = align(tensors, weights)
    total = aligned.total()
    return aligned.result(total, total != 0)
