"""Values as byte planes under zstd: all lowest bytes, then all second bytes, and so on.

Bytes of one significance resemble each other (the exponents of task-vector values span a few powers of two), those of
different significance do not, so each plane is a zstd frame of its own: stream = planes from the lowest byte up, each
as a u64 length and a zstd frame.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import zstandard

from ..dtypes import BitArray
from ..errors import StreamError

_LEVEL = 1  # the entropy coder does the work; higher levels look for matches, which weights hardly have
_MOST_A_BYTE = 1 << 15  # a zstd block yields at most 128 KiB and takes at least 4 bytes (RFC 8878, section 3.1.1.2)
_LENGTH = struct.Struct("<Q")


class Planes:
    """The `planes` value codec."""

    name = "planes"

    def encode(self, values: BitArray) -> bytes:
        compressor = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True)
        planes = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), values.itemsize)
        stream = bytearray()
        for plane in range(values.itemsize):
            frame = compressor.compress(planes[:, plane].tobytes())
            stream += _LENGTH.pack(len(frame)) + frame
        return bytes(stream)

    def decode(self, data: memoryview, count: int, dtype: np.dtype[Any]) -> BitArray:
        frames = []
        for plane in range(dtype.itemsize):
            if len(data) < _LENGTH.size:
                raise StreamError(f"byte plane {plane} of {dtype.itemsize} is missing")
            (length,) = _LENGTH.unpack_from(data)
            data = data[_LENGTH.size :]
            if length > len(data):
                raise StreamError(f"byte plane {plane} claims {length} bytes where {len(data)} are left")
            frames.append(data[:length])
            data = data[length:]
        if len(data):
            raise StreamError(f"{len(data)} bytes follow the last byte plane")
        try:
            return _join(frames, count, dtype)
        except zstandard.ZstdError as error:
            raise StreamError(f"a byte plane is damaged ({error})") from None


def _join(frames: list[memoryview], count: int, dtype: np.dtype[Any]) -> BitArray:
    # the size in a frame is a claim, and so is the count: they must agree before memory is taken for either
    for plane, frame in enumerate(frames):
        claimed = zstandard.frame_content_size(frame)
        if claimed != count:
            raise StreamError(f"byte plane {plane} claims {claimed} values where {count} are declared")
        if claimed > len(frame) * _MOST_A_BYTE:
            raise StreamError(f"byte plane {plane} claims {claimed} values in {len(frame)} bytes")
    decompressor = zstandard.ZstdDecompressor()
    planes = np.empty((count, dtype.itemsize), np.uint8)
    for plane, frame in enumerate(frames):
        # without the flag bytes after the frame would be ignored
        values = decompressor.decompress(frame, max_output_size=count, allow_extra_data=False)
        planes[:, plane] = np.frombuffer(values, np.uint8)
    return planes.reshape(-1).view(dtype)
