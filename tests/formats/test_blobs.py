"""Whole files in zstd frames: what is stored is read back, and no frame is believed before it is read."""

from __future__ import annotations

import tracemalloc

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from support.lota_files import frame_claiming

from taskvec_formats.blobs import pack_blob, unpack_blob
from taskvec_formats.errors import HeaderError

TEXT = b'{"model_type": "llama"}' * 200
FRAME = zstandard.compress(TEXT, 3)
HUGE = 1 << 40


@given(st.binary(max_size=300) | st.binary(max_size=20).map(lambda part: part * 200))
def test_what_is_packed_is_unpacked(data: bytes) -> None:
    stored = pack_blob(data)
    assert len(stored) <= len(data)
    assert unpack_blob(stored, len(data), "it") == data
    assert unpack_blob(memoryview(stored), len(data), "it") == data
    assert pack_blob(data) == stored


def test_what_does_not_shrink_is_stored_as_it_is() -> None:
    noise = bytes(number * number % 251 for number in range(60))
    assert pack_blob(noise) == noise
    assert pack_blob(b"") == b""
    assert len(pack_blob(TEXT)) < 100


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 1, 20 << 20])
def test_what_would_expand_too_much_is_stored_so_that_it_can_be_read(size: int) -> None:
    data = b" " * size
    stored = pack_blob(data)
    assert unpack_blob(stored, size, "it") == data
    assert len(stored) * 256 >= size or size <= 1 << 20


@pytest.mark.parametrize(
    ("stored", "size", "message"),
    [
        (FRAME, len(TEXT) + 1, f"it claims {len(TEXT)} bytes, expected {len(TEXT) + 1}"),
        (FRAME, len(TEXT) - 1, f"it claims {len(TEXT)} bytes, expected {len(TEXT) - 1}"),
        (FRAME, 0, "it claims"),
        (FRAME, HUGE, f"it claims {HUGE} bytes in {len(FRAME)} stored bytes"),
        (FRAME + b"\0", len(TEXT), "it is damaged"),
        (FRAME + FRAME, len(TEXT), "it is damaged"),
        (FRAME[:-1], len(TEXT), "it is damaged"),
        (b"", 1, "it is damaged"),
        (b"no frame", 100, "it is damaged"),
        (frame_claiming(HUGE), 100, f"it claims {HUGE} bytes, expected 100"),
        (frame_claiming(1 << 19), 1 << 19, "it is damaged|it contains"),
        (frame_claiming(3, b"four"), 3, "it is damaged|it contains"),
        (zstandard.ZstdCompressor(write_content_size=False).compress(TEXT), len(TEXT), "it claims"),
        (b"\x50\x2a\x4d\x18\x00\x00\x00\x00", 100, "it "),  # a frame to be skipped
    ],
)
def test_what_does_not_hold_what_is_declared_is_refused(stored: bytes, size: int, message: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(HeaderError, match=f"^({message})"):
            unpack_blob(stored, size, "it")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20


@given(st.integers(0, 8 * len(FRAME) - 1))
def test_a_flipped_bit_is_refused_or_gives_as_many_bytes(bit: int) -> None:
    damaged = bytearray(FRAME)
    damaged[bit // 8] ^= 1 << bit % 8
    try:
        found = unpack_blob(bytes(damaged), len(TEXT), "it")
    except HeaderError:
        return
    assert len(found) == len(TEXT)


@given(st.binary(max_size=60), st.integers(0, 100))
def test_any_bytes_are_refused_or_give_as_many_as_declared(stored: bytes, size: int) -> None:
    try:
        found = unpack_blob(stored, size, "it")
    except HeaderError:
        return
    assert len(found) == size
