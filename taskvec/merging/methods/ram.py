"""RAM: keep changes of a single vector, average shared ones.

"Reinforced Agent Merging", arXiv 2601.13572.
"""

from typing import Annotated

import numpy as np

from taskvec_formats import SparseTensor

from ...vectors.align import Aligned
from .options import Bounds


def ram(vectors: Aligned, *, epsilon: Annotated[float, Bounds(0)] = 1e-5) -> SparseTensor:
    """The τᵢ of the only vector with a change at a position, or the mean of those with a change.

    Args:
        vectors: The vectors in one range of a tensor. Their weights are not used.
        epsilon: The largest magnitude that does not count as a change.
    """
    held, counts = _changes(vectors, epsilon)
    return vectors.result(vectors.rounded(vectors.rounded(held / np.maximum(counts, 1)).sum(axis=0, dtype=np.float32)))


def ramplus_tl(
    vectors: Aligned,
    *,
    r: float = 0.1,
    alpha: Annotated[float, Bounds(0)] = 0.2,
    epsilon: Annotated[float, Bounds(0)] = 1e-5,
) -> SparseTensor:
    """`ram`, with changes of a single vector times 1 + r·min(ρ, α).

    ρ is the number of shared changes of this vector in the tensor, divided by that of its single ones.

    Args:
        vectors: The vectors in a whole tensor. Their weights are not used.
        r: The strength of the factor.
        alpha: α, the largest ρ.
        epsilon: As in `ram`.
    """
    held, counts = _changes(vectors, epsilon)
    single, shared = (held != 0) & (counts == 1), (held != 0) & (counts > 1)
    ratios = shared.sum(axis=1) / np.maximum(single.sum(axis=1), epsilon or 1).astype(np.float32)
    factors = (1 + np.float32(r) * np.clip(ratios, 0, alpha)).astype(np.float32)
    parts = np.where(single, held * factors[:, None], vectors.rounded(held / np.maximum(counts, 1)))
    return vectors.result(parts.sum(axis=0, dtype=np.float32))


def _changes(vectors: Aligned, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """The values of all vectors, zero where they are no change, f32 [n, u]; and the number of changes, f32 [u]."""
    held = np.stack([vectors.on_cpu(part) for part in vectors.parts])
    held[abs(held) <= vectors.rounded(np.float32(epsilon))] = 0
    return held, np.count_nonzero(held, axis=0).astype(np.float32)
