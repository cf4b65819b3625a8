"""Value codec for patches that stores steps: how many representable numbers lie between the old and the new weight.

The bit patterns of floats, with those of negative numbers inverted, are ordered as their values. A step is the
difference of two such patterns, modulo 2^bits. Its sign is noise. Its magnitude depends on the base's exponent, because
large weights move by one step and small ones by many. The magnitudes are therefore a mixture over the exponent classes
(see `exponents`).

Stream: the signs, one bit per entry, the first entry in the lowest bit; magnitude − 1 of every entry.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..dtypes import BitArray, DType
from ..errors import StreamError
from ..sparse import Indices
from .contract import Frame
from .exponents import exponent_classes
from .mixture import decode_mixture, encode_mixture
from .numbers import MOST


class Steps:
    """The `steps` value codec. It needs the base."""

    name = "steps"

    def encode(self, values: BitArray, indices: Indices, frame: Frame) -> bytes | None:
        if frame.base is None or values.dtype != frame.dtype.carrier or len(values) > MOST:
            return None
        base = frame.base[indices]
        if (values == base).any():
            return None
        step = _ordered(values, frame.dtype) - _ordered(base, frame.dtype)
        down = step >> (8 * step.itemsize - 1) == 1
        beyond_one = np.where(down, ~step, step - 1).astype(step.dtype)  # ~x is −x − 1
        signs = np.packbits(down, bitorder="little").tobytes()
        return signs + encode_mixture(beyond_one, exponent_classes(base, frame.dtype))

    def decode(self, data: memoryview, carrier: np.dtype[Any], indices: Indices, frame: Frame) -> BitArray:
        if frame.base is None or carrier != frame.dtype.carrier:
            raise StreamError("the values can be read only with the base")
        base = frame.base[indices]
        length = (len(indices) + 7) // 8
        if len(data) < length:
            raise StreamError(f"expected at least {length} bytes for the signs, found {len(data)}")
        down = np.unpackbits(np.frombuffer(data[:length], np.uint8), count=len(indices), bitorder="little") == 1
        largest = (1 << 8 * carrier.itemsize - 1) - 1
        beyond_one = decode_mixture(data[length:], exponent_classes(base, frame.dtype), largest).astype(carrier)
        step = np.where(down, ~beyond_one, beyond_one + carrier.type(1)).astype(carrier)
        return _unordered(_ordered(base, frame.dtype) + step, frame.dtype)


def _ordered(bits: BitArray, dtype: DType) -> BitArray:
    if dtype.mantissa is None:
        return bits
    top = 8 * bits.itemsize - 1
    ordered: BitArray = np.where(bits >> top, ~bits, bits | bits.dtype.type(1 << top))
    return ordered


def _unordered(ordered: BitArray, dtype: DType) -> BitArray:
    if dtype.mantissa is None:
        return ordered
    top = 8 * ordered.itemsize - 1
    bits: BitArray = np.where(ordered >> top, ordered & ordered.dtype.type((1 << top) - 1), ~ordered)
    return bits
