"""Positions as gaps: how many positions are skipped before each one, as byte planes under zstd.

The gaps of a mask of density p are close to geometric; nearly all of their information is in the lowest byte, and the
higher planes, mostly zeros, compress to almost nothing. Stream = one byte, the carrier's size (1, 2, 4 or 8), then the
gaps as the `planes` codec writes them.
"""

from __future__ import annotations

import numpy as np

from ..errors import StreamError
from ..sparse import Indices
from .planes import Planes

_WIDTHS = (1, 2, 4, 8)


class Gaps:
    """The `gaps` position codec."""

    name = "gaps"

    def encode(self, indices: Indices, size: int) -> bytes:
        gaps = np.diff(indices, prepend=-1) - 1
        largest = int(gaps.max(initial=0))
        width = next(w for w in _WIDTHS if largest < 1 << 8 * w)
        return bytes([width]) + Planes().encode(gaps.astype(f"<u{width}"))

    def decode(self, data: memoryview, count: int, size: int) -> Indices:
        if not len(data) or data[0] not in _WIDTHS:
            raise StreamError(f"gap width is one of {_WIDTHS}, found {data[0] if len(data) else 'nothing'}")
        gaps = Planes().decode(data[1:], count, np.dtype(f"<u{data[0]}"))
        if gaps.max(initial=0) >= size:
            raise StreamError(f"a gap of {gaps.max()} in a tensor of {size} positions")
        indices: Indices = np.cumsum(gaps, dtype=np.int64)
        indices += np.arange(count, dtype=np.int64)
        return indices
