"""DARE: drop entries at random and let the others grow (Yu et al., arXiv 2311.03099, section 3)."""

import hashlib
from typing import Annotated

import numpy as np

from taskvec_formats import SparseTensor
from taskvec_formats.sparse import Indices

from .options import Bounds
from .pruning import Keep, Request

_STEP, _FIRST, _SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def drop(request: Request, *, seed: Annotated[int, Bounds(-(2**63), 2**64 - 1)] = 0) -> Keep:
    """Keep each entry with the probability `density`.

    Whether one stays depends on `seed`, the vector's number, the tensor's name and the position: not on the order in
    which blocks are computed, nor on the other entries.
    """

    def keep(name: str, start: int, block: SparseTensor) -> Indices:
        key = hashlib.sha256(f"{seed} {request.number} {name}".encode()).digest()
        drawn = _mixed(block.indices.astype(np.uint64) + np.uint64(start), np.frombuffer(key, np.uint64)[0])
        return np.flatnonzero(drawn < np.uint64(round(request.density(name) * 2**64)))

    return keep


def _mixed(positions: np.ndarray, key: np.uint64) -> np.ndarray:
    """Uniform 64-bit numbers, one a position: that place of SplitMix64 (prng.di.unimi.it/splitmix64.c)."""
    z = key + (positions + np.uint64(1)) * _STEP
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    return z ^ (z >> np.uint64(31))
