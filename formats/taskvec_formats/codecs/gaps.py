"""Position codec that stores gaps: how many positions are skipped before each position."""

from __future__ import annotations

import numpy as np

from ..errors import StreamError
from ..sparse import Indices
from .contract import Frame
from .numbers import LEVEL, MOST, decode_numbers, encode_numbers


class Gaps:
    """The `gaps` position codec, which assumes one density for the whole block.

    Args:
        level: Compression level of pcodec for the writer. At 0 the gaps are packed with hardly any entropy coding.
    """

    name = "gaps"

    def __init__(self, level: int = LEVEL) -> None:
        self._level = level

    def encode(self, indices: Indices, frame: Frame) -> bytes | None:
        if len(indices) > MOST:
            return None
        return encode_numbers((np.diff(indices, prepend=-1) - 1).astype(np.uint64), self._level)

    def decode(self, data: memoryview, count: int, frame: Frame) -> Indices:
        gaps = decode_numbers(data, count)
        if count and int(gaps.max()) >= frame.size:
            raise StreamError(f"a gap of {gaps.max()} in a block of {frame.size} positions")
        indices = gaps.astype(np.int64)
        indices += 1
        np.cumsum(indices, out=indices)
        indices -= 1
        return indices
