"""Uncompressed positions and values. They bound the size of the other codecs' results."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..dtypes import BitArray
from ..errors import StreamError
from ..sparse import Indices
from .contract import Frame


class PlainPositions:
    """The `plain` position codec: flat positions in the block, u32 if it has at most 2^32 elements, else u64."""

    name = "plain"

    def encode(self, indices: Indices, frame: Frame) -> bytes | None:
        return indices.astype(_position_type(frame)).tobytes()

    def decode(self, data: memoryview, count: int, frame: Frame) -> Indices:
        return _exactly(data, count, _position_type(frame)).astype(np.int64)


class PlainValues:
    """The `plain` value codec: little-endian carriers."""

    name = "plain"

    def encode(self, values: BitArray, indices: Indices, frame: Frame) -> bytes | None:
        return values.tobytes()

    def decode(self, data: memoryview, carrier: np.dtype[Any], indices: Indices, frame: Frame) -> BitArray:
        return _exactly(data, len(indices), carrier)


def _position_type(frame: Frame) -> np.dtype[Any]:
    return np.dtype("<u4" if frame.size <= 1 << 32 else "<u8")


def _exactly(data: memoryview, count: int, dtype: np.dtype[Any]) -> BitArray:
    if len(data) != count * dtype.itemsize:
        raise StreamError(f"expected {count} values of {dtype.itemsize} bytes, found {len(data)} bytes")
    return np.frombuffer(data, dtype)
