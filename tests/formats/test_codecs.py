"""One kit for every codec that a `.lota` file may name: what the contract promises, on good bytes and on bad ones.

And the parts that codecs share, each beside a naive answer.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from support.oracle import bit_patterns, carriers

from taskvec_formats.codecs import POSITION_CODECS, VALUE_CODECS, Frame
from taskvec_formats.codecs.bits import pack_bits, unpack_bits
from taskvec_formats.codecs.cells import decode_cells, encode_cells
from taskvec_formats.codecs.exponents import CLASSES, exponent_classes
from taskvec_formats.codecs.mixture import GROUPS, decode_mixture, encode_mixture
from taskvec_formats.codecs.numbers import decode_numbers, encode_numbers, join, split
from taskvec_formats.dtypes import DTYPES, DType
from taskvec_formats.errors import StreamError

CARRIERS = [np.dtype(f"<u{size}") for size in (1, 2, 4, 8)]
F32, BF16, I32 = DTYPES["F32"], DTYPES["BF16"], DTYPES["I32"]
SHAPES = [(1, 1), (1, 40), (40, 1), (6, 7), (2, 5000), (5000, 2)]


@dataclass(frozen=True)
class Sample:
    """Entries of a block: what any codec is given, or made of."""

    frame: Frame
    indices: Any
    values: Any


@dataclass(frozen=True)
class Subject:
    """A codec behind one face: entries to bytes, bytes and as much as a reader knows of the entries to an array."""

    dtype: np.dtype[Any] | None
    encode: Callable[[Sample], bytes | None]
    decode: Callable[[bytes, Sample], Any]
    wanted: Callable[[Sample], Any]

    def holds(self, sample: Sample) -> bool:
        return self.encode(sample) is not None


def position_subject(name: str) -> Subject:
    codec = POSITION_CODECS[name]
    return Subject(
        None,
        lambda sample: codec.encode(sample.indices, sample.frame),
        lambda data, sample: codec.decode(memoryview(data), len(sample.indices), sample.frame),
        lambda sample: sample.indices,
    )


def value_subject(name: str, carrier: np.dtype[Any]) -> Subject:
    codec = VALUE_CODECS[name]
    return Subject(
        carrier,
        lambda sample: codec.encode(sample.values, sample.indices, sample.frame),
        lambda data, sample: codec.decode(memoryview(data), carrier, sample.indices, sample.frame),
        lambda sample: sample.values,
    )


SUBJECTS = {name: position_subject(name) for name in POSITION_CODECS} | {
    f"{name}-u{8 * carrier.itemsize}": value_subject(name, carrier) for name in VALUE_CODECS for carrier in CARRIERS
}
every_codec = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS.keys())


@st.composite
def samples(draw: st.DrawFn, subject: Subject) -> Sample:
    """Entries in a block of some shape, sparse or dense, with and without a base."""
    carrier = subject.dtype
    rows, cols = draw(st.sampled_from(SHAPES))
    size = rows * cols
    if draw(st.booleans()):
        held = draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=min(size, 60)))
        indices = np.array(sorted(held), np.int64)
    else:  # dense, or full
        step = draw(st.integers(1, 3))
        first = draw(st.integers(0, size - 1))
        indices = np.arange(first if step > 1 else 0, size, step, dtype=np.int64)
    fitting = [dtype for dtype in DTYPES.values() if carrier is None or dtype.carrier == carrier]
    dtype = draw(st.sampled_from(fitting))
    values = draw(nps.arrays(carrier or dtype.carrier, len(indices), elements=bit_patterns(dtype), fill=st.just(1)))
    base = None
    if draw(st.booleans()):
        base = draw(nps.arrays(dtype.carrier, size, elements=bit_patterns(dtype), fill=bit_patterns(dtype)))
    if base is not None and draw(st.booleans()):
        # a patch holds changes only, and few of many steps
        values = base[indices] + values // 2 + dtype.carrier.type(1)
        values[values == base[indices]] += dtype.carrier.type(1)
    return Sample(Frame(rows, cols, dtype, base), indices, values.astype(carrier or dtype.carrier))


def example(subject: Subject) -> Sample:
    """Entries to damage: every codec takes them that takes values of their width."""
    dtype = next(d for d in DTYPES.values() if d.carrier == (subject.dtype or BF16.carrier))
    dtype = BF16 if dtype.itemsize == 2 else dtype
    indices = np.array([3, 4, 9, 300, 301, 1000, 1001, 2999])
    noise = np.arange(3000, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # Knuth's multiplicative hash
    base = (noise >> np.uint64(64 - 8 * dtype.itemsize)).astype(dtype.carrier)
    values = base[indices] + np.array([1, 2, 1, 1, 9, 200, 3, 1]).astype(dtype.carrier)
    return Sample(Frame(30, 100, dtype, base), indices, values)


TAKING = {name: subject for name, subject in SUBJECTS.items() if subject.holds(example(subject))}
every_codec_that_takes_it = pytest.mark.parametrize("subject", TAKING.values(), ids=TAKING.keys())


def test_every_codec_takes_the_example_but_for_values_of_another_width() -> None:
    assert SUBJECTS.keys() - TAKING.keys() == {"floats-u8", "floats-u16", "floats-u64"}


def stream_of(subject: Subject) -> tuple[bytes, Sample]:
    sample = example(subject)
    stream = subject.encode(sample)
    assert stream is not None
    return stream, sample


def assert_round_trip(subject: Subject, sample: Sample) -> None:
    stream = subject.encode(sample)
    if stream is None:
        return
    decoded, wanted = subject.decode(stream, sample), subject.wanted(sample)
    assert decoded.dtype == (subject.dtype or np.int64)
    assert np.array_equal(decoded, wanted)


def assert_refused_or_well_formed(subject: Subject, data: bytes, sample: Sample) -> None:
    try:
        decoded = subject.decode(data, sample)
    except StreamError:
        return
    assert (decoded.dtype, decoded.shape) == (subject.dtype or np.int64, (len(sample.indices),))


@every_codec
@settings(max_examples=30)
@given(data=st.data())
def test_round_trip(subject: Subject, data: st.DataObject) -> None:
    assert_round_trip(subject, data.draw(samples(subject)))


# which codec must take what: a kit that only skips would prove nothing
@pytest.mark.parametrize("base", [False, True], ids=["without base", "with base"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_codec_declines_only_what_it_says(name: str, *, base: bool) -> None:
    subject = SUBJECTS[name]
    sample = example(subject)
    if not base:
        sample = replace(sample, frame=replace(sample.frame, base=None))
    codec = name.split("-", maxsplit=1)[0]
    declined = (codec in {"exponents", "steps"} and not base) or (codec == "floats" and not name.endswith("u32"))
    assert subject.holds(sample) == (not declined)


@pytest.mark.parametrize("codec", POSITION_CODECS)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 70_000), (70_000, 1)])
def test_positions_may_fill_the_block_or_be_its_ends(codec: str, shape: tuple[int, int]) -> None:
    size = shape[0] * shape[1]
    base = np.arange(size).astype("<u2")
    for places in (np.arange(size), np.unique([0, size - 1]), np.array([0]), np.array([size - 1])):
        sample = Sample(Frame(*shape, BF16, base), places.astype(np.int64), None)
        assert SUBJECTS[codec].holds(sample)
        assert_round_trip(SUBJECTS[codec], sample)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("codec", VALUE_CODECS)
@settings(max_examples=8)
@given(data=st.data())
def test_every_bit_pattern_survives(codec: str, dtype: DType, data: st.DataObject) -> None:
    base, values = data.draw(carriers(dtype, 20)), data.draw(carriers(dtype, 20))
    frame = Frame(4, 5, dtype, base)
    subject = value_subject(codec, dtype.carrier)
    assert_round_trip(subject, Sample(frame, np.arange(20), values))
    moved = np.flatnonzero(values != base)
    if len(moved) and codec == "steps":
        sample = Sample(frame, moved, values[moved])
        assert subject.holds(sample)
        assert_round_trip(subject, sample)


@every_codec
@settings(max_examples=10)
@given(data=st.data())
def test_the_same_entries_give_the_same_bytes(subject: Subject, data: st.DataObject) -> None:
    sample = data.draw(samples(subject))
    copied = replace(sample, indices=sample.indices.copy(), values=sample.values.copy())
    assert subject.encode(sample) == subject.encode(copied)


@every_codec_that_takes_it
def test_memory_layout_does_not_show_in_the_bytes(subject: Subject) -> None:
    stream, sample = stream_of(subject)
    indices, values = (np.repeat(array, 2)[::2] for array in (sample.indices, sample.values))
    assert subject.encode(replace(sample, indices=indices, values=values)) == stream


@every_codec
def test_arrays_that_cannot_be_written_are_enough(subject: Subject) -> None:
    sample = example(subject)
    for array in (sample.indices, sample.values, sample.frame.base):
        array.setflags(write=False)
    assert_round_trip(subject, sample)


@every_codec_that_takes_it
def test_every_truncation_is_refused(subject: Subject) -> None:
    stream, sample = stream_of(subject)
    for length in range(len(stream)):
        with pytest.raises(StreamError):
            subject.decode(stream[:length], sample)


@every_codec_that_takes_it
@pytest.mark.parametrize("tail", [b"\0", b"\0" * 8, b"(\xb5/\xfd"])
def test_trailing_bytes_are_refused(subject: Subject, tail: bytes) -> None:
    stream, sample = stream_of(subject)
    with pytest.raises(StreamError):
        subject.decode(stream + tail, sample)


@pytest.mark.parametrize("name", [name for name in TAKING if not name.startswith("steps")])
def test_another_count_than_was_stored_is_refused(name: str) -> None:
    stream, sample = stream_of(SUBJECTS[name])
    for count in (1, 7, 9, 1000):
        with pytest.raises(StreamError):
            SUBJECTS[name].decode(stream, replace(sample, indices=np.arange(count)))


@every_codec_that_takes_it
def test_another_count_than_was_stored_gives_no_other_number_of_values(subject: Subject) -> None:
    # equal numbers take no bits each, so a stream of them is one of any count
    stream, sample = stream_of(subject)
    for count in (1, 7, 9, 1000):
        assert_refused_or_well_formed(subject, stream, replace(sample, indices=np.arange(count)))


@pytest.mark.parametrize("name", POSITION_CODECS)
def test_a_count_that_no_stream_can_hold_takes_no_memory(name: str) -> None:
    subject = SUBJECTS[name]
    stream, sample = stream_of(subject)
    tracemalloc.start()
    try:
        with pytest.raises(StreamError):
            POSITION_CODECS[name].decode(memoryview(stream), 1 << 40, sample.frame)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 21


@every_codec_that_takes_it
def test_every_changed_byte_is_refused_or_gives_as_many_values(subject: Subject) -> None:
    stream, sample = stream_of(subject)
    for place in range(len(stream)):
        # all bits, each bit, and the neighbours
        for change in (0xFF, 1, 2, 4, 8, 16, 32, 64, 128, 3, 0x7F):
            damaged = bytearray(stream)
            damaged[place] ^= change
            assert_refused_or_well_formed(subject, bytes(damaged), sample)


@every_codec
@settings(max_examples=30)
@given(stream=st.binary(max_size=100), count=st.integers(1, 100))
def test_any_bytes_are_refused_or_give_as_many_values(subject: Subject, stream: bytes, count: int) -> None:
    sample = replace(example(subject), indices=np.arange(count))
    assert_refused_or_well_formed(subject, stream, sample)


@pytest.mark.parametrize("name", ["exponents", "steps"])
def test_what_was_measured_from_a_base_is_not_read_without_one(name: str) -> None:
    subject = SUBJECTS.get(name) or SUBJECTS[f"{name}-u16"]
    stream, sample = stream_of(subject)
    with pytest.raises(StreamError, match="only with the base"):
        subject.decode(stream, replace(sample, frame=replace(sample.frame, base=None)))


@pytest.mark.parametrize(("name", "carrier"), [("floats", "<u2"), ("steps", "<u4"), ("packed", "<u1")])
def test_values_of_another_width_are_refused(name: str, carrier: str) -> None:
    subject = SUBJECTS[f"{name}-u{32 if name == 'floats' else 16}"]
    stream, sample = stream_of(subject)
    with pytest.raises(StreamError):
        VALUE_CODECS[name].decode(memoryview(stream), np.dtype(carrier), sample.indices, sample.frame)


MANY = (1 << 24) + 1


@pytest.mark.parametrize("name", ["gaps", "packed-u8"])
def test_more_entries_than_the_coder_takes_are_declined(name: str) -> None:
    # a row of that many elements is one block, all of which may change; `plain` holds it
    indices = np.arange(MANY) if name == "gaps" else np.arange(1)
    sample = Sample(Frame(1, MANY, DTYPES["U8"]), indices, np.zeros(MANY, "u1"))
    assert SUBJECTS[name].encode(sample) is None


# numbers


@settings(max_examples=40)
@given(st.sampled_from(CARRIERS).flatmap(lambda carrier: nps.arrays(carrier, st.integers(0, 300))))
def test_numbers_come_back_in_the_least_width(numbers: Any) -> None:
    stored = encode_numbers(numbers)
    found = decode_numbers(memoryview(stored), len(numbers))
    assert found.tolist() == numbers.tolist()
    if len(numbers):
        largest = max(numbers.tolist())
        assert found.itemsize == stored[0] == min(width for width in (1, 2, 4, 8) if largest < 256**width)
    else:
        assert stored == b""


@pytest.mark.parametrize("largest", [0, 255, 256, 65_535, 65_536, (1 << 32) - 1, 1 << 32, (1 << 64) - 1])
def test_numbers_at_the_ends_of_a_width(largest: int) -> None:
    numbers = np.array([largest, 0, largest], np.uint64)
    assert decode_numbers(memoryview(encode_numbers(numbers)), 3).tolist() == numbers.tolist()


def test_more_numbers_than_one_chunk_takes_are_refused_before_memory_is_taken() -> None:
    with pytest.raises(StreamError, match="at most"):
        decode_numbers(memoryview(encode_numbers(np.arange(9, dtype=np.uint8))), 1 << 40)


def test_no_numbers_are_no_bytes() -> None:
    with pytest.raises(StreamError, match="no numbers"):
        decode_numbers(memoryview(b"\1"), 0)


@settings(max_examples=40)
@given(st.lists(st.binary(max_size=300), min_size=1, max_size=6))
def test_streams_side_by_side_are_told_apart(parts: list[bytes]) -> None:
    assert [bytes(part) for part in split(memoryview(join(parts)), len(parts))] == parts


def test_lengths_are_leb128() -> None:
    assert join([b"a" * 127, b"b" * 128, b"c" * 16_384, b"d"]) == b"".join(
        (b"\x7f", b"a" * 127, b"\x80\x01", b"b" * 128, b"\x80\x80\x01", b"c" * 16_384, b"d")
    )


@pytest.mark.parametrize("stream", [b"", b"\x80", b"\x02a", b"\xff" * 20, b"\x80" * 8 + b"\x01", b"\xff" * 8 + b"\x7f"])
def test_lengths_that_lie_are_refused(stream: bytes) -> None:
    with pytest.raises(StreamError):
        split(memoryview(stream), 2)


# bits


def naive_bits(numbers: list[int], widths: list[int]) -> bytes:
    """The docstring of bits.py, a bit at a time."""
    order = sorted(range(len(widths)), key=lambda place: -widths[place])
    out = bytearray()
    for low in range(0, max(widths, default=0), 8):
        out += bytes(numbers[place] >> low & 0xFF for place in order if widths[place] >= low + 8)
        narrower = [place for place in order if widths[place] < low + 8]
        for bit in range(low, low + 7):
            bitmap = [numbers[place] >> bit & 1 for place in narrower if widths[place] > bit]
            for first in range(0, len(bitmap), 8):
                out.append(sum(one << number for number, one in enumerate(bitmap[first : first + 8])))
    return bytes(out)


WIDTHS = st.lists(st.integers(0, 64) | st.integers(0, 9), max_size=40)


@settings(max_examples=40)
@given(WIDTHS, st.randoms(use_true_random=False))
def test_bits_are_packed_as_described(widths: list[int], random: Any) -> None:
    numbers = [random.getrandbits(64) for _ in widths]
    narrow = np.array(widths, np.uint8)
    packed = pack_bits(np.array(numbers, np.uint64), narrow)
    assert packed == naive_bits(numbers, widths)
    kept = [number & (1 << width) - 1 for number, width in zip(numbers, widths, strict=True)]
    assert unpack_bits(memoryview(packed), narrow, np.dtype(np.uint64)).tolist() == kept


@pytest.mark.parametrize("carrier", CARRIERS)
@settings(max_examples=12)
@given(data=st.data())
def test_bits_of_narrow_numbers(carrier: np.dtype[Any], data: st.DataObject) -> None:
    numbers = data.draw(nps.arrays(carrier, st.integers(0, 40)))
    width = st.integers(0, 8 * carrier.itemsize)
    widths = data.draw(st.lists(width, min_size=len(numbers), max_size=len(numbers)))
    packed = pack_bits(numbers, np.array(widths, np.uint8))
    assert packed == naive_bits(numbers.tolist(), widths)
    found = unpack_bits(memoryview(packed), np.array(widths, np.uint8), carrier)
    assert found.dtype == carrier
    assert found.tolist() == [n & (1 << w) - 1 for n, w in zip(numbers.tolist(), widths, strict=True)]


def test_a_length_that_is_not_that_of_the_bits_is_refused() -> None:
    widths = np.array([1, 3, 9, 17, 0, 8], np.uint8)
    packed = pack_bits(np.full(6, 0xFFFFFFFF, np.uint32), widths)
    for data in (*(packed[:length] for length in range(len(packed))), packed + b"\0"):
        with pytest.raises(StreamError):
            unpack_bits(memoryview(data), widths, np.dtype(np.uint32))


def test_bits_beyond_the_last_number_are_refused() -> None:
    with pytest.raises(StreamError, match="beyond the last"):
        unpack_bits(memoryview(b"\x08"), np.array([1, 1, 1], np.uint8), np.dtype(np.uint8))


# mixture


@st.composite
def mixed(draw: st.DrawFn) -> tuple[Any, Any]:
    """Numbers whose size depends on their class."""
    classes = np.array(draw(st.lists(st.integers(0, 23), min_size=1, max_size=80)), np.uint8)
    bits = draw(st.lists(st.sampled_from([1, 4, 8, 20, 33, 63]), min_size=24, max_size=24))
    numbers = [draw(st.integers(0, (1 << bits[number]) - 1)) for number in classes.tolist()]
    return np.array(numbers, np.uint64), classes


@settings(max_examples=40)
@given(mixed())
def test_a_mixture_round_trip(case: tuple[Any, Any]) -> None:
    numbers, classes = case
    stream = encode_mixture(numbers, classes)
    assert decode_mixture(memoryview(stream), classes, (1 << 63) - 1).tolist() == numbers.tolist()


@settings(max_examples=40)
@given(mixed())
def test_a_mixture_is_read_as_described(case: tuple[Any, Any]) -> None:
    """The docstring of mixture.py, class by class."""
    numbers, classes = case
    first, *streams, low = split(memoryview(encode_mixture(numbers, classes)), 2 + GROUPS)
    present = sorted(set(classes.tolist()))
    described = decode_numbers(first, len(present)).tolist()
    members = [numbers[classes == number].tolist() for number in present]
    for group, stream in enumerate(streams):
        tops = [n >> (d >> 3) for d, held in zip(described, members, strict=True) if d & 7 == group for n in held]
        assert decode_numbers(stream, len(tops)).tolist() == tops
    widths = [d >> 3 for d, held in zip(described, members, strict=True) for _ in held]
    assert bytes(low) == naive_bits([n for held in members for n in held], widths)


def test_classes_that_differ_do_not_share_a_distribution() -> None:
    classes = np.arange(4000, dtype=np.int64).astype(np.uint8) % 2
    numbers = np.where(classes == 0, 0, np.arange(4000) % 16).astype(np.uint32)
    first, *_ = split(memoryview(encode_mixture(numbers, classes)), 2 + GROUPS)
    assert len({d & 7 for d in decode_numbers(first, 2).tolist()}) == 2


def test_more_classes_than_groups_are_united() -> None:
    classes = np.repeat(np.arange(24), 500).astype(np.uint8)
    numbers = (classes.astype(np.uint64) * np.uint64(2) % np.uint64(41)).astype(np.uint64)
    stream = memoryview(encode_mixture(numbers, classes))
    described = decode_numbers(split(stream, 2 + GROUPS)[0], 24)
    assert len(set((described & 7).tolist())) <= GROUPS
    assert decode_mixture(stream, classes, 100).tolist() == numbers.tolist()


def test_a_number_beyond_the_largest_is_refused() -> None:
    for largest in (0, 4, 300, 70_000):
        numbers, classes = np.array([largest + 1, 0], np.uint32), np.zeros(2, np.uint8)
        stream = memoryview(encode_mixture(numbers, classes))
        assert decode_mixture(stream, classes, largest + 1).tolist() == numbers.tolist()
        with pytest.raises(StreamError, match=f"larger than {largest}"):
            decode_mixture(stream, classes, largest)


@pytest.mark.parametrize("described", [64 << 3, 255 << 3, 1 << 40, 1 << 63, (1 << 64) - 8])
def test_more_low_bits_than_a_number_has_are_refused(described: int) -> None:
    low = b"\0" * (described >> 3 & 0xFF)  # enough, should it come to reading them
    tops = [encode_numbers(np.zeros(1, np.uint8)), *[b""] * (GROUPS - 1)]
    stream = join((encode_numbers(np.array([described], np.uint64)), *tops, low))
    with pytest.raises(StreamError, match="low bits"):
        decode_mixture(memoryview(stream), np.zeros(1, np.uint8), (1 << 63) - 1)


# cells


@st.composite
def celled(draw: st.DrawFn) -> tuple[Any, Any, Any]:
    """(places, cells, sizes): any subset of each cell."""
    sizes = draw(st.lists(st.integers(0, 30) | st.integers(1 << 20, (1 << 32) - 1), min_size=1, max_size=8))
    places, cells = [], []
    for cell, size in enumerate(sizes):
        held = draw(st.sets(st.integers(0, size - 1), max_size=20)) if size else set()
        places += sorted(held)
        cells += [cell] * len(held)
    return tuple(np.array(each, np.int64) for each in (places, cells, sizes))


@settings(max_examples=40)
@given(celled())
def test_cells_round_trip(case: tuple[Any, Any, Any]) -> None:
    places, cells, sizes = case
    if not len(places):
        return
    stream = encode_cells(places, cells, sizes)
    found = decode_cells(memoryview(stream), len(places), sizes)
    assert [each.tolist() for each in found] == [places.tolist(), cells.tolist()]


@settings(max_examples=40)
@given(celled())
def test_cells_are_stored_as_described(case: tuple[Any, Any, Any]) -> None:
    """Counts, then gaps; the classes of the gaps are checked by reading them with naive ones."""
    places, cells, sizes = case
    if not len(places):
        return
    first, second = split(memoryview(encode_cells(places, cells, sizes)), 2)
    counts = [cells.tolist().count(cell) for cell in range(len(sizes))]
    assert decode_numbers(first, len(sizes)).tolist() == counts
    classes, gaps = [], []
    for cell, (count, size) in enumerate(zip(counts, sizes.tolist(), strict=True)):
        # mean gap in 1/256; its square, in whole numbers, halved until nothing is left: floor(2 · log2)
        mean = min((size << 8) // max(count, 1), 1 << 31)
        classes += [max(0, (mean * mean >> 16).bit_length() - 1)] * count
        last = -1
        for place in places[cells == cell].tolist():
            gaps.append(place - last - 1)
            last = place
    found = decode_mixture(second, np.array(classes, np.uint8), (1 << 32) - 1)
    assert found.tolist() == gaps


@pytest.mark.parametrize(
    ("counts", "gaps"),
    [
        ([0, 0], []),
        ([4, 0], [0, 0, 0, 0]),
        ([2, 2], [0, 2, 0, 0]),
        ([2, 2], [0, 0, 4, 0]),
        ([2, 2], [0, 0, 0, 99]),
        ([(1 << 64) - 1, 5], [0, 0, 0, 0]),
        ([1 << 63, 1 << 63], [0, 0, 0, 0]),
    ],
)
def test_cells_that_lie_are_refused(counts: list[int], gaps: list[int]) -> None:
    sizes = np.array([3, 5])
    held = [min(count, 8) for count in counts]
    classes = np.zeros(len(gaps), np.uint8)
    mixture = encode_mixture(np.array(gaps, np.uint32), classes) if gaps else b"\0" * (1 + GROUPS)
    stream = join((encode_numbers(np.array(counts, np.uint64)), mixture))
    with pytest.raises(StreamError):
        decode_cells(memoryview(stream), 4 if sum(held) else 1, sizes)


# exponents and steps


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@settings(max_examples=12)
@given(data=st.data())
def test_classes_count_down_from_the_largest_exponent(dtype: DType, data: st.DataObject) -> None:
    base = data.draw(carriers(dtype, 12))
    found = exponent_classes(base, dtype).tolist()
    if dtype.mantissa is None:
        assert found == [0] * 12
        return
    width = 8 * dtype.itemsize - 1 - dtype.mantissa
    exponents = [bits >> dtype.mantissa & (1 << width) - 1 for bits in base.tolist()]
    lowest = max(0, max(exponents) - CLASSES + 1)
    assert found == [max(0, exponent - lowest) for exponent in exponents]


@pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if d.itemsize == 1], ids=lambda dtype: dtype.name)
def test_a_step_between_any_two_bytes(dtype: DType) -> None:
    base, values = (array.reshape(-1).astype("<u1") for array in np.meshgrid(np.arange(256), np.arange(256)))
    moved = np.flatnonzero(base != values)
    sample = Sample(Frame(256, 256, dtype, base), moved, values[moved])
    assert SUBJECTS["steps-u8"].holds(sample)
    assert_round_trip(SUBJECTS["steps-u8"], sample)


def test_steps_are_signs_then_magnitudes() -> None:
    # bf16: 1.0 is 0x3F80, −1.0 is 0xBF80; mirrored, 0x0000 is one above 0x8000
    base = np.array([0x3F80, 0x3F80, 0xBF80, 0xBF80, 0x8000], "<u2")
    values = np.array([0x3F82, 0x3F7F, 0xBF81, 0xBF7F, 0x0000], "<u2")
    stream = VALUE_CODECS["steps"].encode(values, np.arange(5), Frame(5, 1, BF16, base))
    assert stream is not None
    assert stream[0] == 0b00110 | 0b00000
    magnitudes = decode_mixture(memoryview(stream)[1:], exponent_classes(base, BF16), 1 << 15)
    assert magnitudes.tolist() == [1, 0, 0, 0, 0]


def test_values_that_stay_as_they_are_have_no_step() -> None:
    base = np.array([1, 2, 3], "<u2")
    assert VALUE_CODECS["steps"].encode(base[1:2], np.array([1]), Frame(3, 1, BF16, base)) is None


# floats


@settings(max_examples=40)
@given(nps.arrays(np.dtype("<u4"), st.integers(1, 40), elements=bit_patterns(F32)))
def test_floats_are_cut_as_described(values: Any) -> None:
    stream = VALUE_CODECS["floats"].encode(values, np.arange(len(values)), Frame(len(values), 1, F32))
    assert stream is not None
    heads, zeros, rest = split(memoryview(stream), 3)
    numbers = values.tolist()
    assert decode_numbers(heads, len(values)).tolist() == [number >> 15 & 0xFFFF for number in numbers]
    trailing = [next((bit for bit in range(15) if number >> bit & 1), 15) for number in numbers]
    assert decode_numbers(zeros, len(values)).tolist() == trailing
    pairs = list(zip(numbers, trailing, strict=True))
    noise = [number >> 31 | ((number & 0x7FFF) >> z & ~1 if z < 15 else 0) for number, z in pairs]
    assert bytes(rest) == naive_bits(noise, [15 - z if z < 15 else 1 for z in trailing])


@pytest.mark.parametrize(("head", "zero"), [(1 << 16, 0), (0, 16)])
def test_heads_and_zeros_out_of_range_are_refused(head: int, zero: int) -> None:
    parts = [encode_numbers(np.array([number], np.uint32)) for number in (head, zero)]
    with pytest.raises(StreamError, match="out of range"):
        VALUE_CODECS["floats"].decode(
            memoryview(join((*parts, b"\0\0"))), np.dtype("<u4"), np.array([0]), Frame(1, 1, F32)
        )


# gaps


def test_gaps_are_the_positions_skipped() -> None:
    stream = POSITION_CODECS["gaps"].encode(np.array([0, 1, 5, 300]), Frame(400, 1, F32))
    assert stream is not None
    assert decode_numbers(memoryview(stream), 4).tolist() == [0, 0, 3, 294]


def test_a_gap_as_long_as_the_block_is_refused() -> None:
    stream = POSITION_CODECS["gaps"].encode(np.array([0, 150]), Frame(200, 1, F32))
    assert stream is not None
    with pytest.raises(StreamError, match="100 positions"):
        POSITION_CODECS["gaps"].decode(memoryview(stream), 2, Frame(100, 1, F32))


def test_a_gap_beyond_64_bits_of_sign_is_refused() -> None:
    stream = encode_numbers(np.array([1, (1 << 64) - 2], np.uint64))
    with pytest.raises(StreamError, match="a gap of"):
        POSITION_CODECS["gaps"].decode(memoryview(stream), 2, Frame(100, 1, F32))


# paper64


def words(indices: list[int], rows: int, cols: int) -> tuple[list[int], list[int]]:
    """The u32 of every entry, and the escapes."""
    stream = POSITION_CODECS["paper64"].encode(np.array(indices), Frame(rows, cols, F32))
    assert stream is not None
    return np.frombuffer(stream[: 4 * len(indices)], "<u4").tolist(), np.frombuffer(
        stream[4 * len(indices) :], "<u8"
    ).tolist()


def test_the_bits_of_a_paper64_position() -> None:
    # (0, 3), (0, 7), (2, 1), (2, 5): the column is a difference within a row, absolute in a new one
    found, escapes = words([3, 7, 21, 25], 10, 10)
    assert found == [0 << 12 | 3, 0 << 12 | 4, 2 << 12 | 1, 0 << 12 | 4]
    assert escapes == []


@pytest.mark.parametrize(
    ("indices", "rows", "cols", "expected", "absolute"),
    [
        ([4095], 1, 5000, [4095], []),
        ([4096], 1, 5000, [0xFFF000], [4096]),
        ([0, 4096], 1, 5000, [0, 0xFFF000], [4096]),
        ([0, 4095, 4999], 1, 5000, [0, 4095, 904], []),
        ([4094], 5000, 1, [4094 << 12], []),
        ([4095], 5000, 1, [0xFFF000], [4095]),
        ([4095, 4096], 5000, 1, [0xFFF000, 1 << 12], [4095]),
        # the entry after an escape counts from it
        ([4999, 5000, 9999], 2, 5000, [0xFFF000, 1 << 12, 0xFFF000], [4999, 9999]),
        ([5000, 9500], 2, 5000, [1 << 12, 0xFFF000], [9500]),
    ],
)
def test_what_12_bits_do_not_hold_escapes(
    indices: list[int], rows: int, cols: int, expected: list[int], absolute: list[int]
) -> None:
    assert words(indices, rows, cols) == (expected, absolute)
    assert_round_trip(SUBJECTS["paper64"], Sample(Frame(rows, cols, F32), np.array(indices), None))


@settings(max_examples=40)
@given(st.sets(st.integers(0, 64 * 4096 - 1), min_size=1, max_size=100))
def test_paper64_takes_4_bytes_an_entry_where_nothing_escapes(places: set[int]) -> None:
    indices = np.array(sorted(places))
    stream = POSITION_CODECS["paper64"].encode(indices, Frame(64, 4096, F32))
    assert stream is not None
    assert len(stream) == 4 * len(indices)


@pytest.mark.parametrize(
    ("entries", "escapes", "message"),
    [
        ([1 << 24], [], "layer or module"),
        ([1 << 31], [], "layer or module"),
        ([0xFFF000], [], "escapes take 8"),
        ([5], [5], "escapes take 8"),
        ([0xFFF000], [100], "outside the block"),
        ([0xFFF000], [(1 << 64) - 1], "outside the block"),
        ([0xFFF001], [5], "its column is not 0"),
    ],
)
def test_paper64_that_cannot_be_is_refused(entries: list[int], escapes: list[int], message: str) -> None:
    stream = np.array(entries, "<u4").tobytes() + np.array(escapes, "<u8").tobytes()
    with pytest.raises(StreamError, match=message):
        POSITION_CODECS["paper64"].decode(memoryview(stream), len(entries), Frame(10, 10, F32))


# plain


def test_plain_positions_take_4_bytes_in_a_block_that_allows_it() -> None:
    for cols, width in ((1 << 32, 4), ((1 << 32) + 1, 8)):
        frame = Frame(1, cols, F32)
        stream = POSITION_CODECS["plain"].encode(np.array([1, cols - 1]), frame)
        assert stream is not None
        assert len(stream) == 2 * width
        assert POSITION_CODECS["plain"].decode(memoryview(stream), 2, frame).tolist() == [1, cols - 1]
