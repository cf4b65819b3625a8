"""Value codec for f32 deltas that separates the compressible bits from the noise.

A delta is a difference of two weights, and so a multiple of the weight's resolution: below a bit that varies from
weight to weight, it consists of zeros. A generic coder does not see this bit, nor that the bits just above it are
noise. This codec divides a value into
  head   exponent and the HEAD highest mantissa bits: few distinct numbers, entropy coded;
  zeros  number of trailing zeros among the LOW low bits, LOW if all are zero: few distinct numbers, entropy coded;
  rest   the sign, and the bits between the head and the lowest set bit: noise, stored without compression.
Every bit pattern is preserved, including NaN payloads, because no step uses floating-point arithmetic on values.

Stream: heads; zeros; for each value, LOW − zeros bits, or 1 bit if zeros = LOW: the sign in the lowest bit, then the
rest.
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
        # the number of trailing zeros is the exponent of the lowest set bit as an f32 number
        zeros = (lowest.astype(np.float32).view(np.uint32) >> 23).astype(np.uint8) - np.uint8(127)
        zeros[low == 0] = LOW
        sign = values >> np.uint32(_SIGN)
        rest = (low >> zeros) & ~np.uint32(1) | sign
        heads = (values >> np.uint32(LOW)) & np.uint32(_HEADS - 1)
        return join((encode_numbers(heads), encode_numbers(zeros), pack_bits(rest, _widths(zeros))))

    def decode(self, data: memoryview, carrier: np.dtype[Any], indices: Indices, frame: Frame) -> BitArray:
        if carrier.itemsize != 4:
            raise StreamError(f"expected values of 4 bytes, found {carrier.itemsize}")
        count = len(indices)
        first, second, third = split(data, 3)
        heads, zeros = decode_numbers(first, count), decode_numbers(second, count)
        if count and (int(heads.max()) >= _HEADS or int(zeros.max()) > LOW):
            raise StreamError("a head or a number of zeros is out of range")
        zeros = zeros.astype(np.uint8)
        rest = unpack_bits(third, _widths(zeros), np.dtype("<u2"))
        sign = rest.astype("<u4") << np.uint32(_SIGN)
        # if all low bits are zero, the shift moves the implied lowest set bit out of the mask
        low = (rest | np.uint16(1)) << zeros & np.uint16(_LOW_MASK)
        values: BitArray = heads.astype("<u4") << np.uint32(LOW) | sign | low
        return values


def _widths(zeros: BitArray) -> BitArray:
    widths: BitArray = np.uint8(LOW) - zeros + (zeros == LOW)
    return widths
