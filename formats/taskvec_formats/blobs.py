"""Whole files and the index inside a `.lota` file: zstd frames, or the bytes as they are."""

from __future__ import annotations

import zstandard

from .errors import HeaderError

_LEVEL = 19
_EXPANSION = 256  # a reader takes no more memory than this times what is stored,
_ALWAYS = 1 << 20  # or this


def pack_blob(data: bytes) -> bytes:
    """What is stored for `data`: a zstd frame, or itself where that is no shorter, or shorter than a reader accepts."""
    frame = zstandard.ZstdCompressor(level=_LEVEL).compress(data)
    return frame if len(frame) < len(data) <= _most(len(frame)) else data


def unpack_blob(stored: bytes | memoryview, size: int, what: str) -> bytes:
    """The `size` bytes that `stored` holds. Raises HeaderError, naming `what`, where it does not."""
    if len(stored) == size:
        return bytes(stored)
    if size > _most(len(stored)):
        raise HeaderError(f"{what} claims {size} bytes in {len(stored)} stored ones")
    try:
        # the frame's own claim comes first: memory is taken for it
        claimed = zstandard.frame_content_size(stored)
        if claimed != size:
            raise HeaderError(f"{what} claims {claimed} bytes where {size} are declared")
        data = zstandard.ZstdDecompressor().decompress(stored, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise HeaderError(f"{what} is damaged ({error})") from None
    if len(data) != size:
        raise HeaderError(f"{what} holds {len(data)} bytes where {size} are declared")
    return data


def _most(stored: int) -> int:
    return max(_ALWAYS, _EXPANSION * stored)
