"""Bits that do not compress, packed: the low bits of numbers, as many of each as its width says.

The numbers are taken widest first, equal widths in their order, so that whoever has a given bit stands at the front.
For byte k = 0, 1, …: byte k of every number at least 8(k+1) bits wide; then, of the narrower ones, bit 8k of all that
have it, bit 8k+1 and so on, each as a bitmap, first number in the lowest bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import StreamError
from .numbers import Unsigned

Widths = npt.NDArray[np.uint8]


def pack_bits(numbers: Unsigned, widths: Widths) -> bytes:
    """numbers: unsigned [n]; widths: uint8 [n], how many low bits of each are kept, at most 64."""
    wider, order = _sorted(widths)
    numbers = numbers[order]
    planes: list[bytes] = []
    for low in range(0, 64, 8):
        if not wider[low + 1]:
            break
        whole = wider[low + 8]
        planes.append((numbers[:whole] >> numbers.dtype.type(low)).astype(np.uint8).tobytes())
        part = (numbers[whole : wider[low + 1]] >> numbers.dtype.type(low)).astype(np.uint8)
        for bit in range(7):
            held = part[: wider[low + bit + 1] - whole]
            planes.append(np.packbits(held >> np.uint8(bit) & np.uint8(1), bitorder="little").tobytes())
    return b"".join(planes)


def unpack_bits(data: memoryview, widths: Widths, dtype: np.dtype[Any]) -> Unsigned:
    """Return numbers of type `dtype`, wide enough for `widths`. Raises StreamError where the length does not fit."""
    wider, order = _sorted(widths)
    planes = np.frombuffer(data, np.uint8)
    found = np.zeros(len(widths), dtype)
    for low in range(0, 64, 8):
        if not wider[low + 1]:
            break
        whole, held = wider[low + 8], wider[low + 1]
        byte = np.zeros(held, np.uint8)
        byte[:whole], planes = _take(planes, whole)
        part = byte[whole:]
        for bit in range(7):
            count = wider[low + bit + 1] - whole
            if not count:
                break
            plane, planes = _take(planes, (count + 7) // 8)
            if count % 8 and plane[-1] >> count % 8:
                raise StreamError("bits beyond the last number are set")
            part[:count] |= np.unpackbits(plane, count=count, bitorder="little") << np.uint8(bit)
        found[:held] |= byte.astype(dtype) << dtype.type(low)
    if len(planes):
        raise StreamError(f"{len(planes)} bytes follow the last bits")
    numbers: Unsigned = np.empty(len(widths), dtype)
    numbers[order] = found
    return numbers


def _sorted(widths: Widths) -> tuple[list[int], npt.NDArray[np.int64] | slice]:
    """How many numbers are at least w wide, for w = 0 to 64, and their order, widest first."""
    counts = np.bincount(widths, minlength=65)
    wider: list[int] = np.cumsum(counts[::-1])[::-1].tolist()
    one_width = np.count_nonzero(counts) <= 1
    return wider, slice(None) if one_width else np.argsort(np.uint8(64) - widths, kind="stable")


def _take(planes: Unsigned, length: int) -> tuple[Unsigned, Unsigned]:
    if length > len(planes):
        raise StreamError(f"{length} bytes of bits are expected where {len(planes)} are left")
    return planes[:length], planes[length:]
