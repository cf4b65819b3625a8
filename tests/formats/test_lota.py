"""`.lota` files: what is written is read back to the bit, and whatever is wrong with a file has a type and a name."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from support.lota_files import (
    DEFECTS,
    PATCH_BASE,
    Codecs,
    Parts,
    base_bits,
    blocks_of,
    encode_with,
    in_blob,
    indexed,
    side_file,
    write_good,
)
from support.oracle import bit_patterns, carriers, exact, shapes, sparse_tensors

from taskvec_formats import (
    Change,
    Form,
    FormatError,
    Header,
    Identity,
    LotaReader,
    LotaWriter,
    SparseTensor,
    TensorSpec,
)
from taskvec_formats.blocks import CODECS, decode_block, encode_block, touched_digest
from taskvec_formats.codecs import POSITION_CODECS, VALUE_CODECS
from taskvec_formats.dtypes import DTYPES
from taskvec_formats.errors import ChecksumError, HeaderError, StreamError
from taskvec_formats.lota import BLOCKS

BASE = Identity("base", "ba5e" * 16)
F32, BF16, U8 = DTYPES["F32"], DTYPES["BF16"], DTYPES["U8"]
NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)
FILE_NAMES = NAMES.filter(lambda name: name not in {"", ".", ".."} and not set(name) & set("/\\") and "." not in name)
SHORT = st.none() | st.binary(min_size=8, max_size=8).map(bytes.hex)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
# spec, change, base
Item = tuple[TensorSpec, Change, Any]


@st.composite
def items(draw: st.DrawFn, kind: str, name: str) -> Item:
    dtype, shape = draw(st.sampled_from(list(DTYPES.values()))), draw(shapes())
    size = Form(dtype, shape).size
    origin = draw(st.none() | st.just(Form(dtype, shape)) | st.builds(Form, st.just(F32), shapes()))
    spec = TensorSpec(name, dtype, shape, origin, draw(st.booleans()), draw(SHORT))
    flat = st.just((size,))
    delta = SparseTensor.empty((size,))
    if dtype.additive and kind == "vector":
        delta = draw(sparse_tensors(shape=flat))
    replacements = draw(sparse_tensors(bit_patterns(dtype), dtype.carrier, flat))
    return spec, Change(delta, replacements), draw(carriers(dtype, size))


@st.composite
def contents(draw: st.DrawFn) -> tuple[Header, list[Item]]:
    kind = draw(st.sampled_from(["vector", "patch"]))
    names = sorted(draw(st.sets(NAMES, max_size=4)))
    header = Header(
        kind,
        BASE,
        draw(st.none() | st.just(Identity("tuned", "7" * 64))),
        (),
        tuple(sorted(draw(st.sets(NAMES, max_size=2)) - set(names))),
        provenance=draw(st.dictionaries(NAMES, JSON, max_size=3)),
    )
    return header, [draw(items(kind, name)) for name in names]


def write(path: Path, header: Header, tensors: list[Item], codecs: Codecs = None) -> Path:
    with LotaWriter(path, header) as writer:
        for spec, change, base in tensors:
            writer.add(spec, blocks_of(header.kind, spec, change, base, codecs))
    return path


def header_of(kind: str = "vector") -> Header:
    return Header(kind, BASE, None, ())


@pytest.fixture(params=["vector", "patch"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def small(kind: str, tmp_path: Path) -> Path:
    return write_good(tmp_path / "small.lota", kind)


@settings(max_examples=60)
@given(content=contents())
def test_what_is_written_is_read_back_to_the_bit(
    content: tuple[Header, list[Item]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    header, tensors = content
    path = write(tmp_path_factory.getbasetemp() / "round-trip.lota", header, tensors)
    reader = LotaReader(path)
    reader.verify()
    found = reader.header
    assert (found.kind, found.base, found.tuned) == (header.kind, header.base, header.tuned)
    assert (found.removed, found.provenance) == (header.removed, header.provenance)
    assert (reader.shards(), reader.files()) == (None, None)
    assert list(reader.specs) == [spec.name for spec, _, _ in tensors]
    for spec, change, base in tensors:
        stored = reader.specs[spec.name]
        for field in ("name", "form", "origin", "eligible", "base"):
            assert getattr(stored, field) == getattr(spec, field)
        assert (stored.entries, stored.replaced) == (len(change.delta), len(change.replacements))
        read = reader.change(spec.name, base=base)
        assert exact(read.delta) == exact(change.delta)
        assert exact(read.replacements) == exact(change.replacements)
    with safe_open(path, "np") as opened:
        assert all(opened.get_tensor(name).dtype == np.uint8 for name in opened.keys())  # noqa: SIM118


@settings(max_examples=20)
@given(content=contents())
def test_the_same_content_gives_the_same_bytes(
    content: tuple[Header, list[Item]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    first, second = (write(folder / name, *content).read_bytes() for name in ("first.lota", "second.lota"))
    assert first == second


@pytest.mark.parametrize("values", VALUE_CODECS)
@pytest.mark.parametrize("positions", POSITION_CODECS)
def test_every_pair_of_codecs_makes_a_file(positions: str, values: str, tmp_path: Path) -> None:
    base = (np.arange(600) * 7919).astype("<u4")
    indices = np.arange(0, 600, 7)
    change = Change(SparseTensor.empty((600,)), SparseTensor((600,), indices, base[indices] + np.uint32(3)))
    spec = TensorSpec.like("w", Form(F32, (20, 30)))
    path = write(tmp_path / "a.lota", header_of("patch"), [(spec, change, base)], (positions, values))
    reader = LotaReader(path)
    block = reader.specs["w"].blocks[0]
    assert block is not None
    assert block.replacements is not None
    assert (block.replacements.positions.codec, block.replacements.values.codec) == (positions, values)
    assert exact(reader.change("w", base=base).replacements) == exact(change.replacements)


@pytest.mark.parametrize("codec", CODECS)
def test_a_writer_may_be_asked_for_a_codec(codec: str) -> None:
    form, size = Form(F32, (30, 40)), 1200
    delta = SparseTensor((size,), np.arange(0, size, 5), np.linspace(-1, 1, 240, dtype="<f4"))
    change = Change(delta, SparseTensor((size,), np.array([7, 8]), np.array([1, 2], "<u4")))
    block, data = encode_block(form, change, codec=codec)
    assert block is not None
    assert block.delta is not None
    allowed = {"auto": set(POSITION_CODECS) - {"paper64"}, "fast": {"gaps"}}.get(codec, {codec})
    assert block.delta.positions.codec in allowed
    assert block.length == len(data)
    read = decode_block(form, block, (0, size), memoryview(data))
    assert exact(read.delta) == exact(delta)
    assert exact(read.replacements) == exact(change.replacements)
    if codec == "paper64":
        assert block.delta.length == 8 * 240  # the paper's 64 bits an entry


def test_more_values_than_a_sample_are_coded_alike() -> None:
    form, count = Form(F32, (1, 30_000)), 20_000
    base = np.full(30_000, 0x3F800000, "<u4")
    values = base[:count] + np.arange(1, count + 1, dtype="<u4") % np.uint32(5) + np.uint32(1)
    values[3] = base[3]  # outside the sample, and nothing that `steps` can hold
    replacements = SparseTensor((30_000,), np.arange(count), values)
    block, data = encode_block(form, Change(SparseTensor.empty((30_000,)), replacements), base)
    assert block is not None
    read = decode_block(form, block, (0, 30_000), memoryview(data), base)
    assert exact(read.replacements) == exact(replacements)


def test_nothing_is_no_block() -> None:
    empty = SparseTensor.empty((6,))
    assert encode_block(Form(F32, (2, 3)), Change(empty, SparseTensor.empty((6,), "<u4"))) == (None, b"")


@given(sparse_tensors(shape=st.just((12,))), sparse_tensors(shape=st.just((12,))))
def test_touched_is_the_union(delta: SparseTensor, replacements: SparseTensor) -> None:
    touched = Change(delta, replacements).touched()
    assert touched.tolist() == sorted({*delta.indices.tolist(), *replacements.indices.tolist()})


def test_the_digest_of_touched_elements_is_that_of_the_documentation() -> None:
    spec, bits = TensorSpec.like("é", Form(BF16, (2, 3))), np.array([1, 2], "<u2")
    digest = hashlib.sha256("é BF16 [2, 3] 7\n".encode() + b"\1\0\2\0").hexdigest()
    assert touched_digest(spec, 7, bits) == digest[:16]


# ranges and blocks

COLS = (1 << 21) + 1  # one row a block
SPAN = 4 * COLS
PLACES = np.array([0, 1, COLS - 1, 2 * COLS, 2 * COLS + 1, 3 * COLS - 1, 4 * COLS - 1])


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tensor of four blocks, of which the second is null, and two more beside it."""
    path = tmp_path_factory.mktemp("wide") / "wide.lota"
    values = np.arange(1, len(PLACES) + 1)
    change = Change(
        SparseTensor((SPAN,), PLACES, values.astype("<f4")),
        SparseTensor((SPAN,), PLACES[1:4], values[1:4].astype("<u1")),
    )
    one = Change(SparseTensor((1,), np.array([0]), np.ones(1, "<f4")), SparseTensor.empty((1,), "<u1"))
    fp8 = DTYPES["F8_E5M2"]
    scalar = Form(fp8, ())
    items = [
        (TensorSpec.like("a", scalar), one, None),
        (TensorSpec("w", fp8, (4, COLS), None), change, None),
        (TensorSpec.like("z", scalar), one, None),
    ]
    return write(path, header_of(), items)


@pytest.mark.parametrize("start", [0, 1, 2, COLS - 1, COLS, COLS + 5, 2 * COLS, 2 * COLS + 1, SPAN - 1, SPAN])
def test_a_range_is_a_slice_of_the_whole(start: int, wide: Path) -> None:
    reader = LotaReader(wide)
    whole = reader.change("w")
    assert whole.delta.indices.tolist() == PLACES.tolist()
    for stop in (start, start + 1, COLS, 2 * COLS, 2 * COLS + 1, 3 * COLS, SPAN - 1, SPAN):
        if not start <= stop <= SPAN:
            continue
        part = reader.change("w", start, stop)
        assert exact(part.delta) == exact(whole.delta.slice_range(start, stop))
        assert exact(part.replacements) == exact(whole.replacements.slice_range(start, stop))


def damage(path: Path, name: str, number: int) -> None:
    """Flip a bit in one stored block of a tensor."""
    reader = LotaReader(path)
    start = reader._file.tensors[BLOCKS].start
    for spec in reader.header.tensors:
        for place, block in enumerate(filter(None, spec.blocks)):
            if (spec.name, place) == (name, number):
                data = bytearray(path.read_bytes())
                data[start] ^= 1
                path.write_bytes(data)
                return
            start += block.length


def test_a_damaged_block_is_named_and_the_others_can_be_read(wide: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.lota"
    path.write_bytes(wide.read_bytes())
    damage(path, "w", 1)
    reader = LotaReader(path)
    assert len(reader.change("w", 0, 2 * COLS).delta) == 3
    assert len(reader.change("w", 3 * COLS).delta) == 1
    assert len(reader.change("a").delta) == len(reader.change("z").delta) == 1
    for start, stop in ((0, SPAN), (2 * COLS, 2 * COLS + 1), (3 * COLS - 1, 3 * COLS)):
        with pytest.raises(ChecksumError, match=rf"damaged\.lota: tensor 'w', block at element {2 * COLS}, byte \d+"):
            reader.change("w", start, stop)
    with pytest.raises(ChecksumError, match=f"tensor 'w', block at element {2 * COLS}"):
        reader.verify()


@pytest.mark.parametrize("threads", ["1", "4"])
def test_the_number_of_threads_shows_nowhere(threads: str, wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKVEC_THREADS", threads)
    seen: list[tuple[int, int]] = []
    LotaReader(wide).verify(lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("threads", ["1", "4"])
def test_the_first_failure_is_reported(
    threads: str, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASKVEC_THREADS", threads)
    path = tmp_path / "damaged.lota"
    path.write_bytes(wide.read_bytes())
    damage(path, "z", 0)
    damage(path, "a", 0)
    with pytest.raises(ChecksumError, match="tensor 'a'"):
        LotaReader(path).verify()


def test_a_patch_is_read_beside_its_base_only(tmp_path: Path) -> None:
    reader = LotaReader(write_good(tmp_path / "a.lota", "patch"))
    with pytest.raises(StreamError, match=r"tensor 'h', block at element 0.*only with its base"):
        reader.change("h")
    assert len(reader.change("h", base=base_bits(reader.specs["h"], PATCH_BASE)).replacements) == 4


def test_a_patch_beside_another_base_gives_another_result_or_an_error(tmp_path: Path) -> None:
    reader = LotaReader(write_good(tmp_path / "a.lota", "patch"))
    spec, right = reader.specs["h"], PATCH_BASE["h"].bits
    block = spec.blocks[0]
    assert block is not None
    for place in reader.change("h", base=right).touched().tolist():
        wrong = right.copy()
        wrong[place] += np.uint16(1)
        try:
            touched = reader.change("h", base=wrong).touched()
        except StreamError:
            continue
        assert touched_digest(spec, 0, wrong[touched]) != block.before


# shards and files


def test_shards_and_files_are_read_back(tmp_path: Path) -> None:
    shards = {"b.safetensors": b"x" * 5000, "a.safetensors": b"", "é.safetensors": bytes(range(256))}
    files = [
        side_file("z.json", b"{}" * 3000),
        side_file("a b", b""),
        side_file("README", b"kept", stored=False),
        side_file("ü", b"\0"),
    ]
    with LotaWriter(tmp_path / "a.lota", header_of()) as writer:
        writer.add_shards(shards)
        writer.add_files(files)
    reader = LotaReader(tmp_path / "a.lota")
    reader.verify()
    assert reader.shards() == shards
    assert list(reader.shards() or ()) == list(shards)
    assert reader.files() == sorted(files, key=lambda file: file.name)
    assert (tmp_path / "a.lota").stat().st_size < 4000


@settings(max_examples=30)
@given(
    shards=st.none()
    | st.dictionaries(FILE_NAMES.map(lambda name: f"{name}.safetensors"), st.binary(max_size=80), max_size=3),
    files=st.none() | st.dictionaries(FILE_NAMES, st.tuples(st.binary(max_size=80), st.booleans()), max_size=3),
)
def test_any_shards_and_files(
    shards: dict[str, bytes] | None, files: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "files.lota"
    side_files = None
    with LotaWriter(path, header_of()) as writer:
        if shards is not None:
            writer.add_shards(shards)
        if files is not None:
            side_files = [side_file(name, content, stored=kept) for name, (content, kept) in sorted(files.items())]
            writer.add_files(side_files)
    reader = LotaReader(path)
    reader.verify()
    assert (reader.shards(), reader.files()) == (shards, side_files)


def test_what_is_not_stored_has_no_content(tmp_path: Path) -> None:
    with LotaWriter(tmp_path / "a.lota", header_of()) as writer:
        writer.add_files([side_file("README", b"kept", stored=False)])
    reader = LotaReader(tmp_path / "a.lota")
    with pytest.raises(ValueError, match="README is not stored"):
        reader.content(reader.header.files[0])


# damage


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


def test_the_digest_is_that_of_the_description(small: Path) -> None:
    reader, parts = LotaReader(small), Parts.of(small)
    assert reader.digest in small.read_bytes().decode("latin-1")
    parts.save(small)
    assert LotaReader(small).digest != reader.digest  # other spaces in the JSON


# hostile files: in order but for one defect


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_refused_by_name_and_without_taking_memory(name: str, tmp_path: Path) -> None:
    path = DEFECTS[name].write(tmp_path / "a.lota")
    tracemalloc.start()
    try:
        with pytest.raises(DEFECTS[name].error, match=f"(?s)^{path}.*{DEFECTS[name].message}") as caught:
            LotaReader(path).verify()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.type is DEFECTS[name].error
    assert peak < 1 << 22


@pytest.mark.parametrize("name", [name for name in DEFECTS if name.endswith("extra-key")])
def test_a_later_minor_version_may_say_more_and_must_not_say_less(name: str, tmp_path: Path) -> None:
    defect = DEFECTS[name]
    path = write_good(tmp_path / "a.lota", defect.kind)
    parts = Parts.of(path)
    assert defect.edit is not None
    defect.edit(parts)
    parts.description["version"] = "1.7"
    LotaReader(parts.save(path)).verify()
    parts.description.pop("provenance")
    with pytest.raises(HeaderError, match="expected the keys"):
        LotaReader(parts.save(path))


def test_a_later_minor_version_is_read(kind: str, small: Path) -> None:
    parts = Parts.of(small)
    parts.description["version"] = "1.7"
    assert list(LotaReader(parts.save(small)).specs) == [tensor["name"] for tensor in parts.index["tensors"]]


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    # JSON can write half a surrogate pair, which no file name and no digest can hold
    parts = Parts.of(write_good(tmp_path / "a.lota", "vector"))
    parts.tensor("w")["name"] = "w\ud800"
    with pytest.raises(HeaderError, match=r"not valid JSON.*surrogates"):
        LotaReader(parts.save(tmp_path / "a.lota"))


def test_two_tensors_are_not_told_apart_by_their_case_or_script(tmp_path: Path) -> None:
    names = sorted(["W", "w", "é", "e\u0301", "", " ", "\u2028", "a/b", "..", "\U0001f9ea", "__metadata__", BLOCKS])
    empty = Change(SparseTensor.empty((0,)), SparseTensor.empty((0,), "<u4"))
    items: list[Item] = [(TensorSpec.like(name, Form(F32, (0,))), empty, None) for name in names]
    assert list(LotaReader(write(tmp_path / "a.lota", header_of(), items)).specs) == names


# the writer


def fine_blocks(form: Form) -> Iterator[Any]:
    delta = SparseTensor((form.size,), np.array([0]), np.ones(1, "<f4"))
    yield encode_with(None, form, Change(delta, SparseTensor.empty((form.size,), "<u4")), None)


def test_tensors_are_added_in_the_order_of_their_names(tmp_path: Path) -> None:
    form = Form(F32, (2,))
    with LotaWriter(tmp_path / "x.lota", header_of()) as writer:
        writer.add(TensorSpec.like("b", form), fine_blocks(form))
        for second in ("a", "b"):
            with pytest.raises(HeaderError, match=f"'{second}' must not follow 'b'"):
                writer.add(TensorSpec.like(second, form), fine_blocks(form))
    assert list(LotaReader(tmp_path / "x.lota").specs) == ["b"]


def test_tensors_come_before_shards_and_shards_before_files(tmp_path: Path) -> None:
    form = Form(F32, (2,))
    with LotaWriter(tmp_path / "x.lota", header_of()) as writer:
        writer.add_shards({"a.safetensors": b"1"})
        with pytest.raises(HeaderError, match="'w' must not follow a shard's header"):
            writer.add(TensorSpec.like("w", form), fine_blocks(form))
        writer.add_files([])
        with pytest.raises(HeaderError, match="must not follow a side file"):
            writer.add_shards({})
    reader = LotaReader(tmp_path / "x.lota")
    assert (reader.shards(), reader.files()) == ({"a.safetensors": b"1"}, [])


@pytest.mark.parametrize(
    ("spec", "count", "error", "message"),
    [
        (TensorSpec.like("w", Form(F32, (2,))), 0, HeaderError, "tensor 'w': 0 blocks, but its shape has 1"),
        (TensorSpec.like("w", Form(F32, (2,))), 2, HeaderError, "tensor 'w': 2 blocks, but its shape has 1"),
        (TensorSpec.like("w", Form(F32, (0,))), 1, HeaderError, "tensor 'w': 1 blocks, but its shape has 0"),
        (TensorSpec.like("w", Form(DTYPES["I32"], (2,))), 1, HeaderError, "additive entries in a vector of I32"),
        (TensorSpec("w", F32, (2,), None, base="x"), 1, HeaderError, "tensor 'w': not a digest"),
    ],
)
def test_what_a_reader_would_refuse_is_not_written(
    spec: TensorSpec, count: int, error: type[FormatError], message: str, tmp_path: Path
) -> None:
    block = next(fine_blocks(Form(F32, (2,))))
    with pytest.raises(error, match=message), LotaWriter(tmp_path / "x", header_of()) as writer:
        writer.add(spec, [block] * count)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "header",
    [
        Header("mask", BASE, None, ()),
        Header("vector", Identity("b", "short"), None, ()),
        Header("vector", BASE, None, (), removed=("b", "a")),
    ],
    ids=["kind", "fingerprint", "removed"],
)
def test_a_header_that_a_reader_would_refuse_is_not_written(header: Header, tmp_path: Path) -> None:
    with pytest.raises(HeaderError), LotaWriter(tmp_path / "x", header):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["..", "a/b", ""])
def test_a_file_name_that_leads_out_is_not_written(name: str, tmp_path: Path) -> None:
    with (
        pytest.raises(HeaderError, match="is not the name of a file"),
        LotaWriter(tmp_path / "x", header_of()) as writer,
    ):
        writer.add_files([side_file(name, b"")])
    assert list(tmp_path.iterdir()) == []


def fail_after_one_tensor(path: Path) -> None:
    form = Form(F32, (2,))
    with LotaWriter(path, header_of()) as writer:
        writer.add(TensorSpec.like("w", form), fine_blocks(form))
        raise ZeroDivisionError


@pytest.mark.parametrize("name", ["small.lota", "new.lota"])
def test_an_error_leaves_nothing_and_an_earlier_file_as_it_was(name: str, small: Path) -> None:
    before = small.read_bytes()
    with pytest.raises(ZeroDivisionError):
        fail_after_one_tensor(small.parent / name)
    assert list(small.parent.iterdir()) == [small]
    assert small.read_bytes() == before


def test_a_description_that_is_no_json_leaves_an_earlier_file_as_it_was(small: Path) -> None:
    before = small.read_bytes()
    header = Header("vector", BASE, None, (), provenance={"loss": float("nan")})
    with pytest.raises(HeaderError, match="provenance cannot be stored as JSON"), LotaWriter(small, header):
        pass
    assert list(small.parent.iterdir()) == [small]
    assert small.read_bytes() == before


def test_a_file_appears_with_its_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "a" / "b" / "x.lota", header_of(), [])
    assert list(path.parent.iterdir()) == [path]


def test_edits_are_all_that_differs(tmp_path: Path) -> None:
    """The helper that makes bad files makes good ones where it is told to change nothing."""
    path = write_good(tmp_path / "a.lota", "vector")
    before = LotaReader(path).header
    for edit in (indexed(), in_blob(1, 90)):
        parts = Parts.of(path)
        edit(parts)
        parts.sign()
        reader = LotaReader(parts.save(path))
        reader.verify()
        assert reader.header == before
