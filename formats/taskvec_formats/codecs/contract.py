"""What a codec is. One file a codec; `tests/test_codecs.py` holds every one of them to the same kit."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from ..dtypes import BitArray
from ..sparse import Indices


class PositionCodec(Protocol):
    """Strictly increasing positions to bytes and back, without loss.

    The same positions give the same bytes on every machine. `decode` raises StreamError for bytes that do not
    hold `count` positions, and allocates no more than the count justifies.
    """

    name: str

    def encode(self, indices: Indices, size: int) -> bytes:
        """indices: int64 [n], strictly increasing in [0, size)."""

    def decode(self, data: memoryview, count: int, size: int) -> Indices:
        """Return the `count` positions, int64 [count]; order and range are checked by SparseTensor."""


class ValueCodec(Protocol):
    """Carriers (unsigned integers of the value's size) to bytes and back, without loss; the same promises."""

    name: str

    def encode(self, values: BitArray) -> bytes:
        """values: carriers [n]."""

    def decode(self, data: memoryview, count: int, dtype: np.dtype[Any]) -> BitArray:
        """Return the `count` carriers of type `dtype`, [count]."""
