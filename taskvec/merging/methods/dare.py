"""DARE: drop entries at random and rescale the remaining ones (Yu et al., arXiv 2311.03099, section 3)."""

import hashlib
from typing import Annotated

import numpy as np
import numpy.typing as npt

from taskvec_formats import SparseTensor
from taskvec_formats.sparse import Indices

from .options import Bounds
from .pruning import Keep, Request, Sampled

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

    def keep(name: str, start: int, block: SparseTensor) -> Sampled:
        density = request.density(name)
        drawn = draws(seed, request.number, name, block.indices, start)
        return Sampled(np.flatnonzero(drawn < np.uint64(round(density * 2**64))), np.float32(density))

    return keep


def draws(seed: int, number: int, name: str, positions: Indices, start: int) -> npt.NDArray[np.uint64]:
    """Draw a random number for each of several positions, which depends on nothing but the arguments.

    Args:
        seed: The seed.
        number: The index of the vector in the merge.
        name: The name of the tensor.
        positions: Positions in a range of the tensor, int64 [n].
        start: The first element of the range.

    Returns:
        Evenly distributed over all numbers of 64 bits, uint64 [n].
    """
    key = hashlib.sha256(f"{seed} {number} {name}".encode()).digest()
    return _splitmix64(positions.astype(np.uint64) + np.uint64(start), np.frombuffer(key, np.uint64)[0])


def _splitmix64(positions: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """The uint64 outputs of SplitMix64 (prng.di.unimi.it/splitmix64.c) at the given positions of its sequence."""
    z = key + (positions + np.uint64(1)) * _STEP
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    found: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return found
