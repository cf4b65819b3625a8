"""Position codec with the layout of the LoTA paper (arXiv 2406.16797, appendix C.6): 32 bits for each position.

A position consists of 5 bits for the layer, 3 for the module, 12 for the row and 12 for the column, each as the
difference from the previous entry. In a stream of one tensor the layer and module never change, so their differences
are zero. Within a row the column is a difference; in a new row it is absolute.

Stream: a little-endian u32 per entry, with the layer in the highest bits and the column in the lowest; then a u64 per
escape, in order. A row difference of 4095 marks an escape: the row difference or the column of this entry does not fit,
and the next u64 is its flat position.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import StreamError
from ..sparse import Indices
from .contract import Frame

_FIELD = 12
_LIMIT = (1 << _FIELD) - 1


class Paper64:
    """The `paper64` position codec. With `plain` values of 32 bits, each entry takes 64 bits as in the paper."""

    name = "paper64"

    def encode(self, indices: Indices, frame: Frame) -> bytes | None:
        row, col = np.divmod(indices, frame.cols)
        down = np.diff(row, prepend=0)
        across = np.where(down == 0, np.diff(col, prepend=0), col)
        escaped = (down >= _LIMIT) | (across > _LIMIT)
        words = np.where(escaped, _LIMIT << _FIELD, down << _FIELD | across)
        return words.astype("<u4").tobytes() + indices[escaped].astype("<u8").tobytes()

    def decode(self, data: memoryview, count: int, frame: Frame) -> Indices:
        if len(data) < 4 * count:
            raise StreamError(f"expected 4 bytes for each of {count} positions, found {len(data)} bytes")
        words = np.frombuffer(data[: 4 * count], "<u4").astype(np.int64)
        if count and int(words.max()) >> 2 * _FIELD:
            raise StreamError("the layer or module changes within a tensor")
        down, across = words >> _FIELD, words & _LIMIT
        escapes = np.flatnonzero(down == _LIMIT)
        if len(data) != 4 * count + 8 * len(escapes):
            raise StreamError(f"{len(data) - 4 * count} bytes follow the positions, {len(escapes)} escapes take 8 each")
        absolute = np.frombuffer(data[4 * count :], "<u8")
        if len(escapes) and (int(absolute.max()) >= frame.size or across[escapes].any()):
            raise StreamError("an escape is outside the block, or its column is not 0")
        rows, cols = np.divmod(absolute.astype(np.int64), frame.cols)
        down[escapes] = 0
        row = _restarted(down, escapes, rows)
        starts = down > 0
        starts[escapes] = True
        across[escapes] = cols
        col = _restarted(across, np.flatnonzero(starts), across[starts])
        return row * frame.cols + col


def _restarted(steps: npt.NDArray[np.int64], at: Indices, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the running sum of `steps`, set to values[i] at index at[i]."""
    total = np.cumsum(steps)
    jumps = np.zeros(len(steps), np.int64)
    offsets = values - total[at]
    jumps[at] = np.diff(offsets, prepend=0)
    total += np.cumsum(jumps)
    return total
