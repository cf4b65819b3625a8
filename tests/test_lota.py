"""`.lota` files: what is written is read back to the bit, and whatever is wrong with a file has a type and a name."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lota_files import Document, Streams, put_together, sign, take_apart
from oracle import bit_patterns, exact, shapes, sparse_tensors
from safetensors import safe_open

from taskvec import TaskVector
from taskvec_formats import Base, FormatError, LotaReader, LotaWriter, SparseTensor, TensorSpec
from taskvec_formats.codecs import VALUE_CODECS
from taskvec_formats.container import SafetensorsFile, encode_header
from taskvec_formats.dtypes import DTYPES
from taskvec_formats.errors import ChecksumError, HeaderError, NotLotaError, StreamError, VersionError
from taskvec_formats.header import KEY

BASE = Base("base", "ba5e" * 16)
F32, BF16, I32 = DTYPES["F32"], DTYPES["BF16"], DTYPES["I32"]
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
DIGESTS = st.none() | st.binary(min_size=32, max_size=32).map(bytes.hex)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
Tensor = tuple[TensorSpec, SparseTensor, SparseTensor]


@st.composite
def tensors(draw: st.DrawFn, name: str) -> Tensor:
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(shapes())
    spec = TensorSpec(name, dtype, shape, draw(st.booleans()), draw(DIGESTS), draw(DIGESTS))
    delta = draw(sparse_tensors(shape=st.just(shape))) if dtype.additive else SparseTensor.empty(shape)
    return spec, delta, draw(sparse_tensors(bit_patterns(dtype), dtype.carrier, st.just(shape)))


CONTENTS = st.sets(NAMES, max_size=4).flatmap(lambda names: st.tuples(*(tensors(name) for name in sorted(names))))


def write(path: Path, contents: tuple[Tensor, ...], provenance: dict[str, Any] | None = None) -> Path:
    with LotaWriter(path, BASE, provenance) as writer:
        for spec, delta, exceptions in contents:
            writer.add(spec, delta, exceptions)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two tensors, `u` (I32, exceptions only) and `w` (BF16, both parts)."""
    three = np.array([0, 2, 5])
    u = SparseTensor((2, 3), three, np.array([1, 2, 3], "<u4"))
    delta = SparseTensor((2, 3), three, np.array([0.5, -0.25, 0], "<f4"))
    exceptions = SparseTensor((2, 3), three[:2], np.array([0x7FC1, 0x8000], "<u2"))
    return write(
        tmp_path / "small.lota",
        (
            (TensorSpec("u", I32, (2, 3)), SparseTensor.empty((2, 3)), u),
            (TensorSpec("w", BF16, (2, 3), base="b" * 64), delta, exceptions),
        ),
        {"made_by": "test"},
    )


@settings(max_examples=60)
@given(contents=CONTENTS, provenance=st.dictionaries(NAMES, JSON, max_size=3))
def test_what_is_written_is_read_back_to_the_bit(
    contents: tuple[Tensor, ...], provenance: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "round-trip.lota", contents, provenance)
    reader = LotaReader(path)
    assert (reader.header.base, reader.header.provenance) == (BASE, provenance)
    assert list(reader.specs) == [spec.name for spec, _, _ in contents]
    for spec, delta, exceptions in contents:
        stored = reader.specs[spec.name]
        assert replace(stored, delta=None, exceptions=None) == spec
        assert stored.entries == len(delta)
        assert exact(reader.delta(spec.name)) == exact(delta)
        assert exact(reader.exceptions(spec.name)) == exact(exceptions)
    with safe_open(path, "np") as opened:
        assert all(opened.get_tensor(name).dtype == np.uint8 for name in opened.keys())  # noqa: SIM118


@settings(max_examples=20)
@given(contents=CONTENTS)
def test_the_same_content_gives_the_same_bytes(
    contents: tuple[Tensor, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    first, second = (write(folder / name, contents).read_bytes() for name in ("first.lota", "second.lota"))
    assert first == second


def test_verify_reports_every_tensor(small: Path) -> None:
    seen: list[tuple[int, int]] = []
    LotaReader(small).verify(lambda done, total: seen.append((done, total)))
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_every_flipped_bit_is_detected(small: Path) -> None:
    good = small.read_bytes()
    with open(small, "r+b", buffering=0) as file:
        for bit in range(8 * len(good)):
            file.seek(bit // 8)
            file.write(bytes([good[bit // 8] ^ 1 << bit % 8]))
            with pytest.raises(FormatError):
                LotaReader(small).verify()
            file.seek(bit // 8)
            file.write(good[bit // 8 : bit // 8 + 1])
    LotaReader(small).verify()


def test_every_truncation_is_detected(small: Path) -> None:
    good = small.read_bytes()
    for length in range(len(good)):
        small.write_bytes(good[:length])
        with pytest.raises(FormatError):
            LotaReader(small).verify()


def test_a_damaged_stream_is_named_and_the_others_can_be_read(small: Path) -> None:
    data = bytearray(small.read_bytes())
    data[-1] ^= 1
    small.write_bytes(data)
    reader = LotaReader(small)
    assert len(reader.delta("w")) == len(reader.exceptions("u")) == 3
    with pytest.raises(ChecksumError, match=r"small\.lota: stream 'w/exceptions.values', bytes \d+ to \d+"):
        reader.exceptions("w")


def alter(**fields: Any) -> Callable[[Document], None]:
    return lambda document: document.update(fields)


def alter_w(*path: str, value: Any) -> Callable[[Document], None]:
    """Set one field inside the description of tensor `w`."""

    def edit(document: Document) -> None:
        place = document["tensors"][1]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (alter(version="9.9"), VersionError, "'9.9', this reader knows '0.1'"),
        (lambda document: document.pop("version"), VersionError, "None"),
        (alter(kind="mask"), HeaderError, "kind is 'vector', found 'mask'"),
        (alter(surprise=1), HeaderError, "surprise"),
        (lambda document: document.pop("kind"), HeaderError, "expected the keys"),
        (alter(tensors={}), HeaderError, "tensors must be list"),
        (alter(tensors=[1]), HeaderError, "tensor None"),
        (lambda document: document["tensors"].reverse(), HeaderError, "order of their names"),
        (lambda document: document["tensors"].append(document["tensors"][1]), HeaderError, "occurs twice"),
        (alter(provenance=[]), HeaderError, "provenance must be dict"),
        (alter(base={"name": "b"}), HeaderError, "base: expected the keys"),
        (alter(base={"name": "b", "fingerprint": "F" * 64}), HeaderError, "base: fingerprint is not a digest"),
        (alter_w("surprise", value=1), HeaderError, "tensor 'w'.*surprise"),
        (alter_w("name", value=7), HeaderError, "tensor 7: name must be str"),
        (alter_w("dtype", value="F32X"), HeaderError, "tensor 'w': unknown dtype 'F32X'"),
        (alter_w("dtype", value="I16"), HeaderError, "tensor 'w': additive entries in a tensor of I16"),
        (alter_w("shape", value=[-1]), HeaderError, "tensor 'w': not a shape"),
        (alter_w("shape", value=[True]), HeaderError, "tensor 'w': not a shape"),
        (alter_w("shape", value=[6.0]), HeaderError, "tensor 'w': not a shape"),
        (alter_w("shape", value=[1 << 24, 1 << 24]), HeaderError, "tensor 'w': not a shape"),
        (alter_w("shape", value=[2]), HeaderError, "tensor 'w', delta: 3 entries in a tensor of 2"),
        (alter_w("eligible", value=1), HeaderError, "tensor 'w': eligible must be bool"),
        (alter_w("base", value="b" * 63), HeaderError, "tensor 'w': base is not a digest"),
        (alter_w("tuned", value=0), HeaderError, "tensor 'w': tuned must be str"),
        (alter_w("delta", value=[]), HeaderError, "tensor 'w', delta"),
        (alter_w("delta", "count", value=0), HeaderError, "tensor 'w', delta: 0 entries"),
        (alter_w("delta", "count", value=7), HeaderError, "tensor 'w', delta: 7 entries in a tensor of 6"),
        (alter_w("delta", "count", value=True), HeaderError, "tensor 'w', delta: count must be int"),
        (alter_w("delta", "count", value=2), StreamError, "tensor 'w', delta"),
        (alter_w("delta", "positions", "codec", value="zip"), HeaderError, "tensor 'w', delta, positions: unknown"),
        (alter_w("delta", "values", "codec", value="gaps"), HeaderError, "tensor 'w', delta, values: unknown codec"),
        (alter_w("delta", "values", "crc32", value="0" * 8), ChecksumError, "w/delta.values"),
        (alter_w("delta", "values", "crc32", value="0" * 9), HeaderError, "tensor 'w', delta, values: crc32"),
        (alter_w("exceptions", "positions", value=None), HeaderError, "tensor 'w', exceptions: positions must be"),
        (alter_w("exceptions", value=None), HeaderError, "w/exceptions.positions"),
        (alter_w("dtype", value="F32"), StreamError, "tensor 'w', exceptions"),
    ],
)
def test_a_description_that_cannot_be_is_refused_by_name(
    edit: Callable[[Document], None], error: type[FormatError], message: str, small: Path
) -> None:
    document, streams = take_apart(small)
    edit(document)
    put_together(small, document, streams)
    with pytest.raises(error, match=f"^{small}: .*{message}") as caught:
        LotaReader(small).verify()
    assert caught.type is error


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"made_by": "test"', '"made_by": "test", "made_by": "test"'),
        ('"count": 2', '"count": 2, "count": 2'),
        ('"made_by": "test"', '"made_by": NaN'),
        ('"made_by": "test"', '"made_by": 1e999'),
        ("{", "["),
    ],
)
def test_a_description_that_is_not_strict_json_is_refused(old: str, new: str, small: Path) -> None:
    document, streams = take_apart(small)
    text = json.dumps(document)
    assert old in text
    put_together(small, text.replace(old, new, 1), streams)
    with pytest.raises(HeaderError, match=str(small)):
        LotaReader(small)


def test_an_altered_description_is_detected(small: Path) -> None:
    data = small.read_bytes()
    assert data.count(b"made_by") == 1
    small.write_bytes(data.replace(b"made_by", b"made_of"))
    with pytest.raises(ChecksumError, match="SHA-256"):
        LotaReader(small)


def test_a_description_without_its_digest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.lota").write_bytes(encode_header({}, {KEY: "{}"}))
    with pytest.raises(ChecksumError):
        LotaReader(tmp_path / "a.lota")


def test_another_safetensors_file_is_no_lota(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(encode_header({"w": ("U8", (1,), 1)}, {"format": "pt"}) + b"x")
    with pytest.raises(NotLotaError, match=r"a\.safetensors"):
        LotaReader(tmp_path / "a.safetensors")


def swap_first_two(streams: Streams) -> None:
    names = list(streams)
    for name in (names[1], names[0], *names[2:]):
        streams[name] = streams.pop(name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda streams: streams.pop("w/delta.values"), "w/delta.values"),
        (lambda streams: streams.update({"x/delta.values": b"x"}), "x/delta.values"),
        (swap_first_two, "their order"),
    ],
    ids=["missing", "extra", "order"],
)
def test_other_streams_than_described_are_refused(edit: Callable[[Streams], Any], message: str, small: Path) -> None:
    document, streams = take_apart(small)
    edit(streams)
    put_together(small, document, streams)
    with pytest.raises(HeaderError, match=f"{small}.*{message}"):
        LotaReader(small)


@pytest.mark.parametrize(("dtype", "shape"), [("I8", lambda n: (n,)), ("U8", lambda n: (1, n))])
def test_streams_are_flat_bytes(dtype: str, shape: Callable[[int], tuple[int, ...]], small: Path) -> None:
    file = SafetensorsFile(small)
    layout = {name: ("U8", info.shape, info.stop - info.start) for name, info in file.tensors.items()}
    size = layout["w/delta.values"][2]
    layout["w/delta.values"] = (dtype, shape(size), size)
    small.write_bytes(encode_header(layout, file.metadata) + small.read_bytes()[len(file.header) :])
    with pytest.raises(HeaderError, match=r"'w/delta\.values' must be U8"):
        LotaReader(small)


@pytest.mark.parametrize(
    ("stream", "edit"),
    [
        ("positions", lambda data: b""),
        ("positions", lambda data: data + b"\0"),
        ("positions", lambda data: b"\3" + data[1:]),
        ("values", lambda data: b""),
        ("values", lambda data: data[:-1]),
        ("values", lambda data: bytes([data[0] ^ 1]) + data[1:]),
    ],
)
def test_a_stream_that_does_not_decode_is_refused_by_name(
    stream: str, edit: Callable[[bytes], bytes], small: Path
) -> None:
    document, streams = take_apart(small)
    streams[f"w/delta.{stream}"] = edit(streams[f"w/delta.{stream}"])
    sign(document, streams)
    put_together(small, document, streams)
    with pytest.raises(StreamError, match=f"{small}: tensor 'w', delta: "):
        LotaReader(small).delta("w")


def test_positions_beyond_the_tensor_are_refused(small: Path) -> None:
    document, streams = take_apart(small)
    document["tensors"][1]["shape"] = [5]
    put_together(small, document, streams)
    with pytest.raises(StreamError, match="tensor 'w', delta: indices 0 to 5 leave a tensor of 5 positions"):
        LotaReader(small).delta("w")


def test_positions_that_wrap_around_are_refused(tmp_path: Path) -> None:
    # gaps of 2^47 − 1 wrap a 64-bit sum after 2^17 steps; the last position lands inside the tensor again
    count, size = (1 << 17) + 1, (1 << 48) - 1
    many = SparseTensor((size,), np.arange(count), np.zeros(count, np.float32))
    path = write(tmp_path / "a.lota", ((TensorSpec("w", F32, (size,)), many, SparseTensor.empty((size,), "<u4")),))
    document, streams = take_apart(path)
    streams["w/delta.positions"] = b"\x08" + VALUE_CODECS["planes"].encode(np.full(count, (1 << 47) - 1, "<u8"))
    sign(document, streams)
    put_together(path, document, streams)
    with pytest.raises(StreamError, match="tensor 'w', delta"):
        LotaReader(path).delta("w")


def test_a_count_that_no_stream_can_hold_is_refused_without_taking_the_memory(small: Path) -> None:
    document, streams = take_apart(small)
    document["tensors"][1]["shape"] = [1 << 47]
    document["tensors"][1]["delta"]["count"] = 1 << 47
    put_together(small, document, streams)
    with pytest.raises(StreamError, match="tensor 'w', delta"):
        LotaReader(small).delta("w")


def test_tensors_are_added_in_the_order_of_their_names(tmp_path: Path) -> None:
    empty = SparseTensor.empty((2,))
    with LotaWriter(tmp_path / "x.lota", BASE) as writer:
        writer.add(TensorSpec("b", F32, (2,)), empty)
        for second in ("a", "b"):
            with pytest.raises(HeaderError, match=f"'{second}' must not follow 'b'"):
                writer.add(TensorSpec(second, F32, (2,)), empty)


@pytest.mark.parametrize(
    ("dtype", "delta", "exceptions"),
    [
        (F32, SparseTensor.empty((3,)), None),
        (F32, SparseTensor.empty((2,), np.float64), None),
        (F32, SparseTensor.empty((2,)), SparseTensor.empty((2,), np.uint16)),
        (F32, SparseTensor.empty((2,)), SparseTensor.empty((2, 1), np.uint32)),
        (I32, SparseTensor((2,), np.array([0]), np.ones(1, np.float32)), None),
    ],
    ids=["shape", "delta dtype", "exception dtype", "exception shape", "delta of an integer tensor"],
)
def test_entries_that_do_not_fit_the_tensor_are_refused(
    dtype: Any, delta: SparseTensor, exceptions: SparseTensor | None, tmp_path: Path
) -> None:
    with pytest.raises(StreamError, match="tensor 'w'"), LotaWriter(tmp_path / "x", BASE) as writer:
        writer.add(TensorSpec("w", dtype, (2,)), delta, exceptions)
    assert list(tmp_path.iterdir()) == []


def fail_after_one_tensor(path: Path) -> None:
    with LotaWriter(path, BASE) as writer:
        writer.add(TensorSpec("w", F32, (2,)), SparseTensor((2,), np.array([0]), np.ones(1, np.float32)))
        raise ZeroDivisionError


@pytest.mark.parametrize("name", ["small.lota", "new.lota"])
def test_an_error_in_the_block_leaves_nothing_and_an_earlier_file_as_it_was(name: str, small: Path) -> None:
    before = small.read_bytes()
    with pytest.raises(ZeroDivisionError):
        fail_after_one_tensor(small.parent / name)
    assert list(small.parent.iterdir()) == [small]
    assert small.read_bytes() == before


def test_a_description_that_is_no_json_leaves_an_earlier_file_as_it_was(small: Path) -> None:
    before = small.read_bytes()
    with pytest.raises(ValueError, match="JSON"), LotaWriter(small, BASE, {"loss": float("nan")}):
        pass
    assert list(small.parent.iterdir()) == [small]
    assert small.read_bytes() == before


def test_a_vector_can_be_saved_over_the_file_it_is_read_from(small: Path) -> None:
    before = small.read_bytes()
    TaskVector.open(small).save(small)
    assert small.read_bytes() == before
    assert list(small.parent.iterdir()) == [small]


def test_the_checksum_is_the_usual_crc_32(small: Path) -> None:
    document, streams = take_apart(small)
    assert document["tensors"][1]["delta"]["values"] == {
        "codec": "planes",
        "crc32": f"{zlib.crc32(streams['w/delta.values']):08x}",
    }
