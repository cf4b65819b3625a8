"""The layout of the LoTA paper (arXiv 2406.16797, appendix C.6): 32 bits of position beside a 32-bit value.

A position is 5 bits of layer, 3 of module, 12 of row and 12 of column, each the difference from the entry before. In a
stream of one tensor layer and module never change, so their differences are zero. Within a row the column is a
difference; in a new row it is absolute.

Stream: a little-endian u32 an entry, layer highest, column lowest; then a u64 for each escape, in order. A row
difference of 4095 marks an escape, for an entry whose row difference or column does not fit: its flat position is the
next u64.
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
    """The `paper64` position codec; beside `plain` values of 32 bits an entry takes the paper's 64."""

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
            raise StreamError(f"{len(data)} bytes where {count} positions take 4 each")
        words = np.frombuffer(data[: 4 * count], "<u4").astype(np.int64)
        if count and int(words.max()) >> 2 * _FIELD:
            raise StreamError("the layer or module changes within a tensor")
        down, across = words >> _FIELD, words & _LIMIT
        escapes = np.flatnonzero(down == _LIMIT)
        if len(data) != 4 * count + 8 * len(escapes):
            raise StreamError(f"{len(data) - 4 * count} bytes follow the positions, {len(escapes)} escapes take 8 each")
        absolute = np.frombuffer(data[4 * count :], "<u8")
        if len(escapes) and (int(absolute.max()) >= frame.size or across[escapes].any()):
            raise StreamError("an escape leaves the block, or has a column beside it")
        rows, cols = np.divmod(absolute.astype(np.int64), frame.cols)
        down[escapes] = 0
        row = _restarted(down, escapes, rows)
        starts = down > 0
        starts[escapes] = True
        across[escapes] = cols
        col = _restarted(across, np.flatnonzero(starts), across[starts])
        return row * frame.cols + col


def _restarted(steps: npt.NDArray[np.int64], at: Indices, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The running sum of `steps`, set to values[i] at the place at[i]."""
    total = np.cumsum(steps)
    jumps = np.zeros(len(steps), np.int64)
    offsets = values - total[at]
    jumps[at] = np.diff(offsets, prepend=0)
    total += np.cumsum(jumps)
    return total
