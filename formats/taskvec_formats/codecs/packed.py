"""Value codec that encodes values of any width as integers with the entropy coder."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..dtypes import BitArray
from ..errors import StreamError
from ..sparse import Indices
from .contract import Frame
from .numbers import MOST, decode_numbers, encode_numbers


class Packed:
    """The `packed` value codec: carriers as unsigned integers."""

    name = "packed"

    def encode(self, values: BitArray, indices: Indices, frame: Frame) -> bytes | None:
        return encode_numbers(values) if len(values) <= MOST else None

    def decode(self, data: memoryview, carrier: np.dtype[Any], indices: Indices, frame: Frame) -> BitArray:
        numbers = decode_numbers(data, len(indices))
        if numbers.itemsize > carrier.itemsize:
            raise StreamError(f"expected numbers of at most {carrier.itemsize} bytes, found {numbers.itemsize}")
        return numbers.astype(carrier, copy=False)
