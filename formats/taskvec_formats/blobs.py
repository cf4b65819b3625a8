"""Blobs of a `.lota` file (whole files and the index): zstd frames, or uncompressed bytes."""

from __future__ import annotations

import zstandard

from .errors import HeaderError

_LEVEL = 19
# a reader accepts content of up to 256 times the stored length, or of 1 MiB if that is more
_EXPANSION = 256
_ALWAYS = 1 << 20


def pack_blob(data: bytes) -> bytes:
    """Compress data as a blob.

    Args:
        data: The content.

    Returns:
        A zstd frame, or `data` itself if the frame is not shorter or expands more than a reader accepts.
    """
    frame = zstandard.ZstdCompressor(level=_LEVEL).compress(data)
    return frame if len(frame) < len(data) <= _most(len(frame)) else data


def unpack_blob(stored: bytes | memoryview, size: int, what: str) -> bytes:
    """Decompress a blob.

    Args:
        stored: The stored bytes.
        size: Size of the content in bytes.
        what: Name of the blob, for error messages.

    Returns:
        The content, `size` bytes.

    Raises:
        HeaderError: The stored bytes do not decompress to `size` bytes, or `size` is too large for them.
    """
    if len(stored) == size:
        return bytes(stored)
    if size > _most(len(stored)):
        raise HeaderError(f"{what} claims {size} bytes in {len(stored)} stored bytes")
    try:
        # check the size that the frame declares first, because memory is allocated for it
        claimed = zstandard.frame_content_size(stored)
        if claimed != size:
            raise HeaderError(f"{what} claims {claimed} bytes, expected {size}")
        data = zstandard.ZstdDecompressor().decompress(stored, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise HeaderError(f"{what} is damaged ({error})") from None
    if len(data) != size:
        raise HeaderError(f"{what} contains {len(data)} bytes, expected {size}")
    return data


def _most(stored: int) -> int:
    return max(_ALWAYS, _EXPANSION * stored)
