"""One kit for every codec that a `.lota` file may name: what the contract promises, on good bytes and on bad ones."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from taskvec_formats.codecs import POSITION_CODECS, VALUE_CODECS, PositionCodec, ValueCodec
from taskvec_formats.errors import StreamError

SIZE = 1 << 40
GAPS = st.integers(1, 3) | st.integers(1, 1 << 33)
POSITIONS = st.lists(GAPS, min_size=1, max_size=60).map(lambda gaps: np.cumsum(gaps, dtype=np.int64) - 1)


@dataclass(frozen=True)
class Subject:
    """A codec behind one face: an array to bytes, bytes and a count to an array.

    samples: arrays it must store. edges: those that are easily forgotten. example: one to damage.
    """

    dtype: np.dtype[Any]
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes, int], Any]
    samples: st.SearchStrategy[Any]
    edges: list[list[int]]
    example: list[int]


def position_subject(codec: PositionCodec) -> Subject:
    return Subject(
        np.dtype(np.int64),
        lambda indices: codec.encode(indices, SIZE),
        lambda data, count: codec.decode(memoryview(data), count, SIZE),
        POSITIONS,
        [[0], [SIZE - 1], [0, SIZE - 1], [1 << 8, 1 << 16, 1 << 32, 1 << 39], [255, 511], [256, 513], list(range(999))],
        [3, 4, 9, 300, 301, 70_000, 70_001, 70_300],
    )


def value_subject(codec: ValueCodec, itemsize: int) -> Subject:
    dtype = np.dtype(f"<u{itemsize}")
    largest = int(np.iinfo(dtype).max)
    return Subject(
        dtype,
        codec.encode,
        lambda data, count: codec.decode(memoryview(data), count, dtype),
        nps.arrays(dtype, st.integers(1, 60)),
        [[0], [largest], [0] * 5000, [largest] * 300, [0, largest]],
        [0, 1, 2, largest, largest - 1, largest // 3, 7, 7],
    )


SUBJECTS = {name: position_subject(codec) for name, codec in POSITION_CODECS.items()} | {
    f"{name}-u{8 * size}": value_subject(codec, size) for name, codec in VALUE_CODECS.items() for size in (1, 2, 4, 8)
}
every_codec = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS.keys())


def assert_round_trip(subject: Subject, array: Any) -> None:
    decoded = subject.decode(subject.encode(array), len(array))
    assert decoded.dtype == subject.dtype
    assert decoded.tolist() == array.tolist()


def assert_refused_or_well_formed(subject: Subject, data: bytes, count: int) -> None:
    try:
        decoded = subject.decode(data, count)
    except StreamError:
        return
    assert (decoded.dtype, decoded.shape) == (subject.dtype, (count,))


@every_codec
@given(data=st.data())
def test_round_trip(subject: Subject, data: st.DataObject) -> None:
    assert_round_trip(subject, data.draw(subject.samples))


@every_codec
def test_round_trip_of_edge_cases(subject: Subject) -> None:
    for edge in subject.edges:
        assert_round_trip(subject, np.array(edge, subject.dtype))


@pytest.mark.parametrize("codec", POSITION_CODECS.values(), ids=POSITION_CODECS.keys())
@pytest.mark.parametrize("size", [1, 2, 257, 70_000])
def test_positions_may_fill_the_tensor(codec: PositionCodec, size: int) -> None:
    decoded = codec.decode(memoryview(codec.encode(np.arange(size), size)), size, size)
    assert decoded.tolist() == list(range(size))


@every_codec
@settings(max_examples=30)
@given(data=st.data())
def test_the_same_array_gives_the_same_bytes(subject: Subject, data: st.DataObject) -> None:
    array = data.draw(subject.samples)
    assert subject.encode(array) == subject.encode(array.copy())


@every_codec
def test_memory_layout_does_not_show_in_the_bytes(subject: Subject) -> None:
    array = np.array(subject.example, subject.dtype)
    assert subject.encode(np.repeat(array, 2)[::2]) == subject.encode(array)


@every_codec
def test_every_truncation_is_refused(subject: Subject) -> None:
    stream = subject.encode(np.array(subject.example, subject.dtype))
    for length in range(len(stream)):
        with pytest.raises(StreamError):
            subject.decode(stream[:length], len(subject.example))


@every_codec
@pytest.mark.parametrize("tail", [b"\0", b"\0" * 8, b"(\xb5/\xfd"])
def test_trailing_bytes_are_refused(subject: Subject, tail: bytes) -> None:
    stream = subject.encode(np.array(subject.example, subject.dtype))
    with pytest.raises(StreamError):
        subject.decode(stream + tail, len(subject.example))


@every_codec
@pytest.mark.parametrize("count", [0, 1, 7, 9, 1000, 1 << 40], ids=lambda count: f"count-{count}")
def test_another_count_than_was_stored_is_refused(subject: Subject, count: int) -> None:
    stream = subject.encode(np.array(subject.example, subject.dtype))
    with pytest.raises(StreamError):
        subject.decode(stream, count)


@every_codec
def test_a_flipped_bit_is_refused_or_gives_another_array(subject: Subject) -> None:
    stream = subject.encode(np.array(subject.example, subject.dtype))
    for bit in range(8 * len(stream)):
        damaged = bytearray(stream)
        damaged[bit // 8] ^= 1 << bit % 8
        assert_refused_or_well_formed(subject, bytes(damaged), len(subject.example))


@every_codec
@given(data=st.binary(max_size=200), count=st.integers(1, 100))
def test_any_bytes_are_refused_or_give_an_array(subject: Subject, data: bytes, count: int) -> None:
    assert_refused_or_well_formed(subject, data, count)


@pytest.mark.parametrize("count", [1, 3, SIZE], ids=lambda count: f"count-{count}")
@pytest.mark.parametrize(("name", "prefix"), [("gaps", b"\1"), ("planes-u8", b"")])
def test_a_frame_that_claims_a_huge_size_is_refused_before_memory_is_taken(
    name: str, prefix: bytes, count: int
) -> None:
    # RFC 8878: magic; descriptor with an 8-byte content size; window descriptor; that size; one last, empty raw block
    frame = b"\x28\xb5\x2f\xfd" + b"\xc0" + b"\x00" + struct.pack("<Q", SIZE) + b"\x01\x00\x00"
    stream = prefix + struct.pack("<Q", len(frame)) + frame
    tracemalloc.start()
    try:
        with pytest.raises(StreamError):
            SUBJECTS[name].decode(stream, count)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("tail", [b"\0", VALUE_CODECS["planes"].encode(np.zeros(2, "u1"))[8:]], ids=["byte", "frame"])
def test_nothing_may_follow_a_frame_inside_its_plane(tail: bytes) -> None:
    stream = VALUE_CODECS["planes"].encode(np.array([1, 2], "u1"))
    longer = struct.pack("<Q", len(stream) - 8 + len(tail)) + stream[8:] + tail
    with pytest.raises(StreamError):
        VALUE_CODECS["planes"].decode(memoryview(longer), 2, np.dtype("u1"))


@pytest.mark.parametrize("codec", POSITION_CODECS.values(), ids=POSITION_CODECS.keys())
def test_a_gap_as_long_as_the_tensor_is_refused(codec: PositionCodec) -> None:
    with pytest.raises(StreamError, match="100 positions"):
        codec.decode(memoryview(codec.encode(np.array([0, 150]), 200)), 2, 100)
