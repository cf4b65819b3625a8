"""Entropy coding of unsigned integers with pcodec, and concatenation of streams.

pcodec (https://github.com/pcodec/pcodec) sorts numbers into bins, encodes the bins with tANS, and stores the offsets
within them without compression. Its wrapped format leaves framing and counts to the caller, which saves some 20 bytes
per stream. A stream here consists of the width of the numbers in bytes (1 byte), pcodec's header (2 bytes), the
metadata of one chunk, and its only page.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec
from pcodec.wrapped import FileCompressor, FileDecompressor

from ..errors import StreamError

Unsigned = npt.NDArray[np.unsignedinteger[Any]]

LEVEL = 8  # compression level of pcodec, at most 12
_WIDTHS = (1, 2, 4, 8)
_DTYPES = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}
MOST = 1 << 24  # limit of pcodec for one chunk


def encode_numbers(numbers: Unsigned, level: int = LEVEL) -> bytes:
    """Encode unsigned integers.

    Args:
        numbers: Unsigned integers [n], n at most MOST.
        level: Compression level of pcodec, 0 is the fastest.

    Returns:
        The stream, empty for n = 0.
    """
    if not len(numbers):
        return b""
    largest = int(numbers.max())
    width = next(w for w in _WIDTHS if largest < 1 << 8 * w)
    config = ChunkConfig(
        compression_level=level,
        mode_spec=ModeSpec.classic(),
        delta_spec=DeltaSpec.no_op(),
        paging_spec=PagingSpec.exact_page_sizes([len(numbers)]),
        enable_8_bit=True,
    )
    file = FileCompressor()
    chunk = file.chunk_compressor(np.require(numbers, f"<u{width}", ["C", "A"]), config)
    stored: bytes = bytes([width]) + file.write_header() + chunk.write_meta() + chunk.write_page(0)
    return stored


def decode_numbers(data: memoryview, count: int) -> Unsigned:
    """Decode the result of `encode_numbers`.

    Args:
        data: The stream.
        count: Number of numbers.

    Returns:
        The numbers [count], in the width in which they are stored.

    Raises:
        StreamError: The stream is damaged, or contains more or less than `count` numbers.
    """
    if not count:
        if len(data):
            raise StreamError(f"expected no numbers, found {len(data)} bytes")
        return np.empty(0, np.uint8)
    if count > MOST:
        raise StreamError(f"{count} numbers in one stream, at most {MOST} are possible")
    if not len(data) or data[0] not in _WIDTHS:
        raise StreamError(f"a number is {_WIDTHS} bytes wide, found {data[0] if len(data) else 'nothing'}")
    width, rest = data[0], bytes(data[1:])
    numbers: Unsigned = np.empty(count, f"<u{width}")
    try:
        file, used = FileDecompressor.new(rest)
        rest = rest[used:]
        chunk, used = file.chunk_decompressor(rest, _DTYPES[width])
        rest = rest[used:]
        progress, used = chunk.read_page_into(rest, count, numbers)
    except RuntimeError as error:
        raise StreamError(f"numbers are damaged ({error})") from None
    if progress.n_processed != count or not progress.finished or used != len(rest):
        raise StreamError(f"decoded {progress.n_processed} of {count} numbers, {len(rest) - used} bytes are left over")
    return numbers


def join(parts: Iterable[bytes]) -> bytes:
    """Concatenate streams. Each stream except the last is preceded by its length as LEB128.

    Args:
        parts: The streams, at least one.

    Returns:
        The joined stream.
    """
    *first, last = parts
    return b"".join(_leb128(len(part)) + part for part in first) + last


def split(data: memoryview, parts: int) -> list[memoryview]:
    """Split the result of `join`.

    Args:
        data: The joined stream.
        parts: Number of streams.

    Returns:
        The streams.

    Raises:
        StreamError: A length is truncated or too large.
    """
    found = []
    for _ in range(parts - 1):
        length = shift = 0
        while True:
            if not len(data) or shift > 56:
                raise StreamError("the length of a stream is truncated")
            byte, data = data[0], data[1:]
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        if length > len(data):
            raise StreamError(f"a stream claims {length} bytes, but only {len(data)} are left")
        found.append(data[:length])
        data = data[length:]
    return [*found, data]


def _leb128(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
