"""Packing of the low bits of numbers, with a width for each number, for bits that do not compress.

The numbers are sorted by width, widest first; numbers of equal width keep their order. The numbers that have a given
bit are then always the first ones. For byte k = 0, 1, …: byte k of every number that is at least 8(k+1) bits wide;
then, for the narrower numbers, bit 8k of all that have it, bit 8k+1, and so on, each as a bitmap with the first number
in the lowest bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import StreamError
from .numbers import Unsigned

Widths = npt.NDArray[np.uint8]


def pack_bits(numbers: Unsigned, widths: Widths) -> bytes:
    """Pack the low bits of numbers.

    Args:
        numbers: Unsigned integers [n].
        widths: uint8 [n], how many low bits of each number are kept, at most 64.

    Returns:
        The packed bits.
    """
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
    """Unpack the result of `pack_bits`.

    Args:
        data: The packed bits.
        widths: uint8 [n], the width of each number.
        dtype: Type of the result, at least as wide as the largest of `widths`.

    Returns:
        The numbers, `dtype` [n].

    Raises:
        StreamError: The length of the data does not match, or unused bits are set.
    """
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
    """Return how many numbers are at least w bits wide, for w = 0 to 64, and the order of the numbers, widest first."""
    least, most = (int(widths.min()), int(widths.max())) if len(widths) else (0, 0)
    counts = np.zeros(65, np.int64)
    for width in range(least, most + 1):  # few widths occur, so this is quicker than np.bincount
        counts[width] = np.count_nonzero(widths == width)
    wider: list[int] = np.cumsum(counts[::-1])[::-1].tolist()
    one_width = least == most
    return wider, slice(None) if one_width else np.argsort(np.uint8(64) - widths, kind="stable")


def _take(planes: Unsigned, length: int) -> tuple[Unsigned, Unsigned]:
    if length > len(planes):
        raise StreamError(f"expected {length} bytes of bits, found {len(planes)}")
    return planes[:length], planes[length:]
