"""Interfaces of the codecs.

Each codec has its own module, and `tests/formats/test_codecs.py` runs the same tests on all of them. A codec stores the
entries of one block: a run of whole rows of a tensor, seen as a matrix whose columns are the last dimension. Apart from
the stored bytes, a codec may use only what is in the Frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..dtypes import BitArray, DType
from ..sparse import Indices


@dataclass(frozen=True)
class Frame:
    """Properties of a block that both writer and reader know.

    Attributes:
        rows: Number of rows.
        cols: Number of columns.
        dtype: Dtype of the tensor.
        base: Carriers of the block in the base, [rows · cols]. None if the entries must be readable without the base.
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
    """Lossless encoding of strictly increasing positions.

    The same positions give the same bytes on every machine.

    Attributes:
        name: Name of the codec in a file.
    """

    name: str

    def encode(self, indices: Indices, frame: Frame) -> bytes | None:
        """Encode positions.

        Args:
            indices: int64 [n], n > 0, strictly increasing in [0, frame.size).
            frame: The block.

        Returns:
            The stream, or None if the codec does not support these positions.
        """

    def decode(self, data: memoryview, count: int, frame: Frame) -> Indices:
        """Decode positions. SparseTensor checks their order and range.

        For any stream, the memory allocated is bounded by `count` and `frame`.

        Args:
            data: The stream.
            count: Number of positions.
            frame: The block.

        Returns:
            The positions, int64 [count].

        Raises:
            StreamError: The stream does not contain `count` positions.
        """


class ValueCodec(Protocol):
    """Lossless encoding of carriers (unsigned integers of the value's size).

    The guarantees are those of PositionCodec.

    Attributes:
        name: Name of the codec in a file.
    """

    name: str

    def encode(self, values: BitArray, indices: Indices, frame: Frame) -> bytes | None:
        """Encode values.

        Args:
            values: Carriers [n].
            indices: Their positions, int64 [n].
            frame: The block.

        Returns:
            The stream, or None if the codec does not support these values.
        """

    def decode(self, data: memoryview, carrier: np.dtype[Any], indices: Indices, frame: Frame) -> BitArray:
        """Decode values.

        Args:
            data: The stream.
            carrier: Type of the values.
            indices: Their positions, int64 [n].
            frame: The block.

        Returns:
            The values, `carrier` [n].

        Raises:
            StreamError: The stream does not contain n values.
        """
