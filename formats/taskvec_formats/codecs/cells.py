"""Positions in a block whose elements are sorted into cells, each cell with a density of its own.

Where density varies, gaps of one distribution for all waste bits. A codec that can tell dense regions from thin ones
(by row and column, or by the base's exponents) cuts the block into cells; inside a cell, positions are counted in its
own elements, and their gaps are geometric with the cell's density. Cells of like density, within a factor of √2, are
one class of the mixture that codes the gaps.

Stream: the number of entries of each cell; the gaps.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import StreamError
from ..sparse import Indices
from .mixture import decode_mixture, encode_mixture
from .numbers import decode_numbers, encode_numbers, join, split


def encode_cells(places: Indices, cells: Indices, sizes: Indices) -> bytes:
    """places: int64 [n], position inside its cell; cells: its cell, not decreasing, places increasing in each.

    sizes: int64 [number of cells], the elements of each, below 2^32.
    """
    counts = np.bincount(cells, minlength=len(sizes))
    gaps = np.diff(places, prepend=-1) - 1
    starts = np.flatnonzero(np.diff(cells, prepend=-1))
    gaps[starts] = places[starts]
    classes = np.repeat(_density_classes(counts, sizes), counts)
    return join((encode_numbers(counts.astype(np.uint64)), encode_mixture(gaps.astype(np.uint32), classes)))


def decode_cells(data: memoryview, count: int, sizes: Indices) -> tuple[Indices, Indices]:
    """Return (places, cells) of the `count` entries. Raises StreamError where a count or a place leaves its cell."""
    first, second = split(data, 2)
    stored = decode_numbers(first, len(sizes))
    if (stored > sizes).any() or int(stored.sum()) != count:
        raise StreamError(f"the cells do not hold {count} entries")
    counts = stored.astype(np.int64)
    classes = np.repeat(_density_classes(counts, sizes), counts)
    places = np.cumsum(decode_mixture(second, classes, int(sizes.max(initial=0))).astype(np.int64) + 1)
    # each cell counts from its own first element
    ends = np.cumsum(counts)
    before = np.concatenate(([0], places))[ends - counts]
    places -= np.repeat(before, counts) + 1
    held = counts > 0
    if (places[ends[held] - 1] >= sizes[held]).any():
        raise StreamError("a position leaves its cell")
    return places, np.repeat(np.arange(len(sizes)), counts)


def _density_classes(counts: npt.NDArray[np.int64], sizes: Indices) -> npt.NDArray[np.uint8]:
    """floor(2 · log2(size / count)) of each cell, in integers: a logarithm may round differently elsewhere."""
    mean = np.minimum((sizes.astype(np.uint64) << np.uint64(8)) // np.maximum(counts, 1).astype(np.uint64), 1 << 31)
    square = (mean * mean) >> np.uint64(16)
    classes = np.zeros(len(sizes), np.uint8)
    for bit in range(1, 48):
        classes += (square >> np.uint64(bit) > 0).astype(np.uint8)
    return classes
