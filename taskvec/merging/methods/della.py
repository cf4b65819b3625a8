"""DELLA: drop entries at random, small ones more often than large ones (Deep et al., arXiv 2406.11617, section 3)."""

from typing import Annotated

import numpy as np
import numpy.typing as npt

from taskvec_formats import SparseTensor

from ...errors import UsageError
from ...vectors.sums import addend
from .dare import draws
from .options import Bounds
from .pruning import Keep, Request, Sampled


def magprune(
    request: Request,
    *,
    epsilon: Annotated[float, Bounds(0, 0.5)] = 0.15,
    seed: Annotated[int, Bounds(-(2**63), 2**64 - 1)] = 0,
) -> Keep:
    """Keep each entry with a probability that grows with the rank of its magnitude in its row.

    The probabilities of a row of n weights are spread evenly from density − ε for the smallest magnitude to density + ε
    for the largest. Weights without an entry have the lowest ranks. A tensor with one dimension is one row. If
    rescaled by density, an entry is divided by its own probability.

    Args:
        request: The vector and its densities.
        epsilon: ε, half the range of the probabilities.
        seed: The seed of the random choice, as in `drop`.

    Returns:
        The function that selects the entries to keep.

    Raises:
        UsageError: A density plus or minus ε is not between 0 and 1.
    """
    for density in sorted({request.density(name) for name in request.vector.specs}):
        if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
            raise UsageError(
                f"density of {request.vector.name} is {density:g} and `epsilon` is {epsilon:g}: density − epsilon must "
                "be above 0 and density + epsilon below 1"
            )

    def keep(name: str, start: int, block: SparseTensor) -> Sampled:
        spec, density = request.vector.specs[name], request.density(name)
        if density <= 0:
            return Sampled(np.zeros(0, np.int64), np.zeros(0, np.float32))
        row, entries, first = spec.form.cols, block, 0
        if len(spec.shape) < 2:
            row = spec.size
            if block.size < row:  # a row of several blocks
                vector = request.vector
                entries, first = addend(vector.name, spec, vector.change(name, 0, spec.size)), start
        shares = _probabilities(entries, row, density, epsilon)
        if entries is not block:
            shares = shares[np.searchsorted(entries.indices, block.indices + first)]
        chosen = draws(seed, request.number, name, block.indices, start) < (shares * 2.0**64).astype(np.uint64)
        kept = np.flatnonzero(chosen)
        return Sampled(kept, shares[kept].astype(np.float32))

    return keep


def _probabilities(entries: SparseTensor, row: int, density: float, epsilon: float) -> npt.NDArray[np.float64]:
    """The probability of each entry of whole rows, f64 [entries]."""
    if row == 1:
        return np.full(len(entries), density)
    rows = entries.indices // row
    # the bits of positive f32 numbers are in the order of the numbers, so one sort orders rows and magnitudes
    bits = np.abs(entries.values.astype(np.float32)).view(np.uint32)
    order = np.argsort(rows.astype(np.uint64) << np.uint64(32) | bits, kind="stable")
    counts = np.bincount(rows, minlength=entries.size // row)
    ends = np.cumsum(counts)[rows[order]]
    ranks = np.empty(len(entries))
    ranks[order] = row - (ends - np.arange(len(entries)))  # from 0 to row - 1, the entries last
    shares: npt.NDArray[np.float64] = (density - epsilon) + ranks / (row - 1) * 2 * epsilon
    return shares
