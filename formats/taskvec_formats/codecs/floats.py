"""f32 deltas, cut where their information changes its nature.

A delta is a difference of two weights and so a multiple of the weight's resolution: below a bit that varies from weight
to weight it is all zeros. A generic coder sees neither that bit nor that the bits just above it are pure noise. Here a
value is cut into
  head   exponent and the highest HEAD mantissa bits: few distinct numbers, entropy coded;
  zeros  how many of the LOW low bits are zero at the end, LOW where all are: few distinct numbers, entropy coded;
  rest   the sign, and the bits between head and the lowest set bit: noise, stored as they are.
Any bit pattern survives, NaN payloads included: nothing here computes with floats.

Stream: heads; zeros; for each value, LOW − zeros bits, or 1 where zeros = LOW: the sign lowest, then the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..dtypes import BitArray
from ..errors import StreamError
from ..sparse import Indices
from .bits import pack_bits, unpack_bits
from .contract import Frame
from .numbers import MOST, decode_numbers, encode_numbers, join, split

HEAD = 8
LOW = 23 - HEAD
_SIGN = 31
_LOW_MASK = np.uint32((1 << LOW) - 1)
_HEADS = 1 << _SIGN - LOW


class Floats:
    """The `floats` value codec, for 4-byte values."""

    name = "floats"

    def encode(self, values: BitArray, indices: Indices, frame: Frame) -> bytes | None:
        if values.itemsize != 4 or len(values) > MOST:
            return None
        low = values & _LOW_MASK
        lowest = low & (~low + np.uint32(1))
        # the exponent of a power of two, as f32, is its number of trailing zeros
        zeros = (lowest.astype(np.float32).view(np.uint32) >> 23).astype(np.uint8) - np.uint8(127)
        zeros[low == 0] = LOW
        sign = values >> np.uint32(_SIGN)
        rest = (low >> zeros) & ~np.uint32(1) | sign
        heads = (values >> np.uint32(LOW)) & np.uint32(_HEADS - 1)
        return join((encode_numbers(heads), encode_numbers(zeros), pack_bits(rest, _widths(zeros))))

    def decode(self, data: memoryview, carrier: np.dtype[Any], indices: Indices, frame: Frame) -> BitArray:
        if carrier.itemsize != 4:
            raise StreamError(f"values of {carrier.itemsize} bytes where the codec holds 4")
        count = len(indices)
        first, second, third = split(data, 3)
        heads, zeros = decode_numbers(first, count), decode_numbers(second, count)
        if count and (int(heads.max()) >= _HEADS or int(zeros.max()) > LOW):
            raise StreamError("a head or a number of zeros is out of range")
        zeros = zeros.astype(np.uint8)
        rest = unpack_bits(third, _widths(zeros), np.dtype("<u2"))
        sign = rest.astype("<u4") << np.uint32(_SIGN)
        # where all low bits are zero the lowest set bit falls off the top
        low = (rest | np.uint16(1)) << zeros & np.uint16(_LOW_MASK)
        values: BitArray = heads.astype("<u4") << np.uint32(LOW) | sign | low
        return values


def _widths(zeros: BitArray) -> BitArray:
    widths: BitArray = np.uint8(LOW) - zeros + (zeros == LOW)
    return widths
