"""Integers through pcodec: the entropy coder under the codecs, and how they lay streams side by side.

pcodec (https://github.com/pcodec/pcodec) bins numbers, codes the bins by tANS and the offsets inside them as they are.
Its wrapped format leaves framing and counts to the caller, which saves some 20 bytes a stream. A stream here is one
byte, the numbers' width in bytes; two, pcodec's header; then the metadata of one chunk and its one page.
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

LEVEL = 8  # of pcodec, up to 12
_WIDTHS = (1, 2, 4, 8)
_DTYPES = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}
MOST = 1 << 24  # numbers that pcodec takes in one chunk


def encode_numbers(numbers: Unsigned, level: int = LEVEL) -> bytes:
    """numbers: unsigned integers [n], at most MOST; an empty list takes no bytes. level: of pcodec, 0 the quickest."""
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
    """Return `count` numbers in the width in which they are stored. Raises StreamError for anything but just that."""
    if not count:
        if len(data):
            raise StreamError(f"{len(data)} bytes where no numbers are expected")
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
        raise StreamError(f"{progress.n_processed} of {count} numbers, {len(rest) - used} bytes left over")
    return numbers


def join(parts: Iterable[bytes]) -> bytes:
    """Streams side by side: each but the last after its length, LEB128."""
    *first, last = parts
    return b"".join(_leb128(len(part)) + part for part in first) + last


def split(data: memoryview, parts: int) -> list[memoryview]:
    """The `parts` streams that `join` laid side by side. Raises StreamError where a length lies."""
    found = []
    for _ in range(parts - 1):
        length = shift = 0
        while True:
            if not len(data) or shift > 56:
                raise StreamError("the length of a stream is cut short")
            byte, data = data[0], data[1:]
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        if length > len(data):
            raise StreamError(f"a stream claims {length} bytes where {len(data)} are left")
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
