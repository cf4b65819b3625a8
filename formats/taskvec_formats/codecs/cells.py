"""Encoding of positions in a block whose elements are divided into cells of different density.

If the density varies within a block, coding all gaps with one distribution wastes bits. A codec that can separate dense
regions from sparse ones (by row and column, or by the base's exponents) divides the block into cells. Positions are
counted among the elements of their cell, so their gaps are geometrically distributed with the cell's density. Cells
whose densities agree within a factor of √2 form one class of the mixture that encodes the gaps.

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
    """Encode positions that are given by cell.

    Args:
        places: int64 [n], position of each entry within its cell, increasing in each cell.
        cells: int64 [n], cell of each entry, not decreasing.
        sizes: int64 [number of cells], elements of each cell, below 2^32.

    Returns:
        The stream.
    """
    counts = np.bincount(cells, minlength=len(sizes))
    gaps = np.diff(places, prepend=-1) - 1
    starts = np.flatnonzero(np.diff(cells, prepend=-1))
    gaps[starts] = places[starts]
    classes = np.repeat(_density_classes(counts, sizes), counts)
    return join((encode_numbers(counts.astype(np.uint64)), encode_mixture(gaps.astype(np.uint32), classes)))


def decode_cells(data: memoryview, count: int, sizes: Indices) -> tuple[Indices, Indices]:
    """Decode the result of `encode_cells`.

    Args:
        data: The stream.
        count: Number of entries.
        sizes: int64 [number of cells], elements of each cell.

    Returns:
        `places` and `cells` of the entries, each int64 [count].

    Raises:
        StreamError: The number of entries is wrong, or a count or a position exceeds its cell.
    """
    first, second = split(data, 2)
    stored = decode_numbers(first, len(sizes))
    if (stored > sizes).any() or int(stored.sum()) != count:
        raise StreamError(f"the entry counts of the cells exceed their sizes or do not add up to {count}")
    counts = stored.astype(np.int64)
    classes = np.repeat(_density_classes(counts, sizes), counts)
    places = np.cumsum(decode_mixture(second, classes, int(sizes.max(initial=0))).astype(np.int64) + 1)
    # positions count from the first element of their cell
    ends = np.cumsum(counts)
    before = np.concatenate(([0], places))[ends - counts]
    places -= np.repeat(before, counts) + 1
    nonempty = counts > 0
    if (places[ends[nonempty] - 1] >= sizes[nonempty]).any():
        raise StreamError("a position is outside its cell")
    return places, np.repeat(np.arange(len(sizes)), counts)


def _density_classes(counts: npt.NDArray[np.int64], sizes: Indices) -> npt.NDArray[np.uint8]:
    """Return floor(2 · log2(size / count)) of each cell.

    It is computed with integers, because logarithms may round differently on another machine.
    """
    mean = np.minimum((sizes.astype(np.uint64) << np.uint64(8)) // np.maximum(counts, 1).astype(np.uint64), 1 << 31)
    square = (mean * mean) >> np.uint64(16)
    classes = np.zeros(len(sizes), np.uint8)
    for bit in range(1, 48):
        classes += (square >> np.uint64(bit) > 0).astype(np.uint8)
    return classes
