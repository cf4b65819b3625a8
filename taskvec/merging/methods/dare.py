"""DARE: drop entries at random and rescale the remaining ones (Yu et al., arXiv 2311.03099, section 3)."""

import hashlib
from typing import Annotated

import numpy as np

from taskvec_formats import SparseTensor
from taskvec_formats.sparse import Indices

from .options import Bounds
from .pruning import Keep, Request

_STEP, _FIRST, _SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def drop(request: Request, *, seed: Annotated[int, Bounds(-(2**63), 2**64 - 1)] = 0) -> Keep:
    """Keep each entry with a probability equal to the density.

    Whether an entry is kept depends on `seed`, the number of the vector, the name of the tensor and the position. It
    does not depend on other entries or on the order in which blocks are computed.

    Args:
        request: The vector and its densities.
        seed: The seed of the random choice.

    Returns:
        The function that selects the entries to keep.
    """

    def keep(name: str, start: int, block: SparseTensor) -> Indices:
        key = hashlib.sha256(f"{seed} {request.number} {name}".encode()).digest()
        draws = _splitmix64(block.indices.astype(np.uint64) + np.uint64(start), np.frombuffer(key, np.uint64)[0])
        return np.flatnonzero(draws < np.uint64(round(request.density(name) * 2**64)))

    return keep


def _splitmix64(positions: np.ndarray, key: np.uint64) -> np.ndarray:
    """The uint64 outputs of SplitMix64 (prng.di.unimi.it/splitmix64.c) at the given positions of its sequence."""
    z = key + (positions + np.uint64(1)) * _STEP
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    return z ^ (z >> np.uint64(31))
