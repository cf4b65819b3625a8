"""SCE: select the positions where the vectors differ most, weigh the vectors by their size, elect signs.

Wan et al., "FuseChat", arXiv 2408.07990, section 3.3.
"""

from collections.abc import Iterator
from typing import Annotated

import numpy as np

from taskvec_formats import SparseTensor

from ...vectors.align import Aligned
from .options import Bounds

_AT_ONCE = 1 << 20  # positions whose intermediate results are held


def sce(vectors: Aligned, *, select_topk: Annotated[float, Bounds(0, 1)] = 1.0) -> SparseTensor:
    """Select, calculate, erase, on a whole tensor.

    The positions with the largest variance of the τᵢ are kept. wᵢ is the mean of the squares of τᵢ over the tensor,
    divided by the sum of these means; if the sum is below 1e-6, all wᵢ are equal. The result is the mean of the τᵢ that
    have the sign of Σ τᵢ, weighted by the wᵢ.

    Args:
        vectors: The vectors in a whole tensor. Their weights are not used.
        select_topk: The share of the positions with a variance above zero that is kept. Ties go to the first.
    """
    held = np.stack([vectors.on_cpu(part) for part in vectors.parts])
    if select_topk < 1:
        held *= _most_varied(held, select_topk, vectors)
    size = int(np.prod(vectors.shape))
    squares = np.zeros(len(held))
    for part in _parts(held):
        squares += vectors.rounded(part * part).sum(axis=1, dtype=np.float64)
    means = vectors.rounded((squares / max(size, 1)).astype(np.float32))
    total = float(vectors.rounded(means.sum(dtype=np.float64).astype(np.float32)))
    shares = np.full(len(held), 1 / len(held), np.float32) if abs(total) < 1e-6 else means / np.float32(total)
    shares = vectors.rounded(shares)
    parts = [_merged(part, shares, vectors) for part in _parts(held)]
    return vectors.result(np.concatenate(parts) if parts else np.zeros(0, np.float32))


def _parts(held: np.ndarray) -> Iterator[np.ndarray]:
    """All vectors at some positions at a time, f32 [n, at most _AT_ONCE]."""
    return (held[:, start : start + _AT_ONCE] for start in range(0, held.shape[1], _AT_ONCE))


def _merged(held: np.ndarray, shares: np.ndarray, vectors: Aligned) -> np.ndarray:
    """The mean of the values with the elected sign, weighted by `shares`, f32 [positions]."""
    mass = vectors.rounded(held.sum(axis=0))
    agrees = (held > 0) & (mass >= 0) | (held < 0) & (mass < 0)
    weights = shares[:, None] * agrees
    merged = vectors.rounded(vectors.rounded(held * weights).sum(axis=0, dtype=np.float32))
    divisor = np.maximum(vectors.rounded(weights.sum(axis=0, dtype=np.float32)), vectors.rounded(np.float32(1e-6)))
    found: np.ndarray = vectors.rounded(merged / divisor)
    return found


def _most_varied(held: np.ndarray, share: float, vectors: Aligned) -> np.ndarray:
    """Whether each position is among those of largest variance, bool [u]."""
    parts = [vectors.rounded(part.astype(np.float64).var(axis=0).astype(np.float32)) for part in _parts(held)]
    variance = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    count = int(np.count_nonzero(variance) * share)
    kept = np.zeros(held.shape[1], bool)
    kept[np.argsort(-variance, kind="stable")[:count]] = True
    return kept
