"""What a codec is. One file a codec; `tests/test_codecs.py` holds every one of them to the same kit.

A codec stores the entries of one block: a run of whole rows of a tensor, seen as a matrix whose columns are the last
dimension. What it may rely on besides the stored bytes is in the Frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..dtypes import BitArray, DType
from ..sparse import Indices


@dataclass(frozen=True)
class Frame:
    """What writer and reader both know of a block.

    rows, cols: its shape. dtype: of the tensor.
    base: carriers of the base in the block, [rows · cols], or None where entries must be readable without the base.
    """

    rows: int
    cols: int
    dtype: DType
    base: BitArray | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.rows * self.cols


class PositionCodec(Protocol):
    """Strictly increasing positions to bytes and back, without loss.

    The same positions give the same bytes on every machine. `decode` raises StreamError for bytes that do not hold
    `count` positions, and allocates no more than count and frame justify.
    """

    name: str

    def encode(self, indices: Indices, frame: Frame) -> bytes | None:
        """indices: int64 [n], n > 0, strictly increasing in [0, size). None where the codec does not suit them."""

    def decode(self, data: memoryview, count: int, frame: Frame) -> Indices:
        """Return the `count` positions, int64 [count]; order and range are checked by SparseTensor."""


class ValueCodec(Protocol):
    """Carriers (unsigned integers of the value's size) to bytes and back, without loss; the same promises."""

    name: str

    def encode(self, values: BitArray, indices: Indices, frame: Frame) -> bytes | None:
        """values: carriers [n] at the positions `indices`, int64 [n]. None where the codec does not suit them."""

    def decode(self, data: memoryview, carrier: np.dtype[Any], indices: Indices, frame: Frame) -> BitArray:
        """Return one value of type `carrier` for each of `indices`."""
