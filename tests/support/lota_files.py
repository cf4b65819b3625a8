"""`.lota` files made from two small checkpoints, and invalid files with exactly one defect each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard

from support.oracle import difference, rounded, value
from taskvec_formats import Change, Form, Header, Identity, LotaReader, LotaWriter, SideFile, SparseTensor, TensorSpec
from taskvec_formats.blocks import encode_block, touched_digest
from taskvec_formats.checkpoint import fingerprint, short, tensor_digest
from taskvec_formats.codecs import POSITION_CODECS, VALUE_CODECS, Frame
from taskvec_formats.container import SafetensorsFile, encode_header
from taskvec_formats.description import DIGEST_KEY, KEY
from taskvec_formats.dtypes import DTYPES, BitArray, DType
from taskvec_formats.errors import (
    ChecksumError,
    FormatError,
    HeaderError,
    NotLotaError,
    NotSafetensorsError,
    StreamError,
    VersionError,
)
from taskvec_formats.forms import take_for
from taskvec_formats.header import Block, EntryStreams, Stream, stored_digest
from taskvec_formats.lota import BLOCKS, INDEX

Document = dict[str, Any]
Codecs = tuple[str, str] | None


class Dense(NamedTuple):
    """A dense tensor.

    Attributes:
        form: Its dtype and shape.
        bits: Its elements as unsigned integers, [size].
    """

    form: Form
    bits: BitArray


Tensors = Mapping[str, Dense]


def dense(dtype: str, bits: Any, shape: tuple[int, ...] | None = None) -> Dense:
    """Build a tensor from bit patterns; the default shape is theirs."""
    array = np.asarray(bits, DTYPES[dtype].carrier)
    return Dense(Form(DTYPES[dtype], array.shape if shape is None else shape), array.reshape(-1))


def reals(dtype: str, values: Any, shape: tuple[int, ...] | None = None) -> Dense:
    """Build a tensor from real numbers, which are rounded to its dtype."""
    with np.errstate(all="ignore"):
        array = np.asarray(values, np.float64).astype(DTYPES[dtype].real)
    return dense(dtype, np.atleast_1d(array).view(DTYPES[dtype].carrier), array.shape if shape is None else shape)


def save_tensors(path: Path, tensors: Tensors) -> None:
    layout = {name: (t.form.dtype.name, t.form.shape, t.bits.nbytes) for name, t in tensors.items()}
    path.write_bytes(encode_header(layout, {}) + b"".join(t.bits.tobytes() for t in tensors.values()))


def identity(name: str, tensors: Tensors) -> Identity:
    return Identity(
        name, fingerprint({key: tensor_digest(key, t.form, t.bits.tobytes()) for key, t in tensors.items()})
    )


def base_bits(spec: TensorSpec, base: Tensors) -> BitArray:
    """Return the bits that a tensor is compared with: those of the base in its form, or zeros for an added tensor."""
    if spec.origin is None:
        return np.zeros(spec.size, spec.dtype.carrier)
    return take_for(base[spec.name].bits, spec.origin, spec.form)


def change_of(kind: str, dtype: DType, base: BitArray, tuned: BitArray) -> Change:
    """Compute the change from one array to another, for a file of this kind."""
    changed = np.flatnonzero(base != tuned)
    delta, replacements = difference(dtype, base[changed], tuned[changed])
    if kind == "patch":
        delta, replacements = {}, dict(enumerate(tuned[changed].tolist()))
    return Change(_entries(len(base), changed, delta, "<f4"), _entries(len(base), changed, replacements, dtype.carrier))


def _entries(size: int, places: Any, values: Mapping[int, Any], dtype: Any) -> SparseTensor:
    return SparseTensor((size,), places[list(values)].astype(np.int64), np.array(list(values.values()), dtype))


def applied(dtype: DType, base: BitArray, change: Change) -> BitArray:
    """Apply a change naively: add each delta, then set the replacements."""
    tuned = base.copy()
    for position, delta in zip(change.delta.indices.tolist(), change.delta.values.tolist(), strict=True):
        tuned[position] = rounded(dtype, value(dtype, int(base[position])) + delta)
    tuned[change.replacements.indices] = change.replacements.values
    return tuned


def encode_with(codecs: Codecs, form: Form, change: Change, base: BitArray | None) -> tuple[Block | None, bytes]:
    """Encode the entries of one block.

    Args:
        codecs: The codecs of positions and values, or None for those that the writer chooses.
        form: The dtype and shape of the tensor.
        change: The entries of the block.
        base: The bits of the base in the block, or None.

    Returns:
        The block for the index, or None if it has no entries, and its bytes.
    """
    if codecs is None:
        return encode_block(form, change, base)
    frame = Frame(change.delta.size // form.cols, form.cols, form.dtype, base)
    parts, data = [], b""
    for tensor in (change.delta, change.replacements):
        if not len(tensor):
            parts.append(None)
            continue
        positions = POSITION_CODECS[codecs[0]].encode(tensor.indices, frame)
        values = VALUE_CODECS[codecs[1]].encode(
            tensor.values.view(f"<u{tensor.values.itemsize}"), tensor.indices, frame
        )
        assert positions is not None
        assert values is not None
        data += positions + values
        streams = Stream(codecs[0], len(positions)), Stream(codecs[1], len(values))
        parts.append(EntryStreams(len(tensor), *streams))
    return (Block(stored_digest(data), *parts), data) if data else (None, b"")


def blocks_of(
    kind: str, spec: TensorSpec, change: Change, base: BitArray | None, codecs: Codecs = None
) -> list[tuple[Block | None, bytes]]:
    """Encode all blocks of a tensor.

    Args:
        kind: The kind of the file.
        spec: The tensor.
        change: Its entries.
        base: The bits of the base, or None if they are not available; the digests of the touched elements are then
            left out.
        codecs: The codecs of positions and values, or None for those that the writer chooses.
    """
    blocks = []
    for start, stop in spec.form.blocks():
        part = Change(change.delta.slice_range(start, stop), change.replacements.slice_range(start, stop))
        before = None if base is None else base[start:stop]
        block, data = encode_with(codecs, spec.form, part, before if kind == "patch" else None)
        if block and before is not None:
            touched = part.touched()
            after = applied(spec.dtype, before, part)
            digests = [touched_digest(spec, start, bits[touched]) for bits in (before, after)]
            block = Block(block.digest, block.delta, block.replacements, *digests)
        blocks.append((block, data))
    return blocks


def write_pair(
    path: Path,
    kind: str,
    base: Tensors,
    tuned: Tensors,
    codecs: Mapping[str, Codecs] | Codecs = None,
    shards: dict[str, bytes] | None = None,
    files: list[SideFile] | None = None,
    provenance: dict[str, Any] | None = None,
) -> Path:
    """Write a file with the change from one checkpoint to another.

    Args:
        path: The file.
        kind: Its kind, "vector" or "patch".
        base: The tensors of the base.
        tuned: The tensors of the tuned checkpoint.
        codecs: The codecs of all tensors, or tensor name -> codecs; None for those that the writer chooses.
        shards: Shard name -> header, or None to store none.
        files: The side files, or None to store none.
        provenance: The provenance.

    Returns:
        The path.
    """
    header = Header(
        kind,
        identity("base", base),
        identity("tuned", tuned),
        (),
        tuple(sorted(base.keys() - tuned.keys())),
        provenance=provenance or {},
    )
    with LotaWriter(path, header) as writer:
        for name in sorted(tuned):
            form, bits = tuned[name]
            origin = base[name].form if name in base else None
            if origin == form and (base[name].bits == bits).all():
                continue
            digest = short(tensor_digest(name, origin, base[name].bits.tobytes())) if origin else None
            spec = TensorSpec(name, form.dtype, form.shape, origin, base=digest)
            before = base_bits(spec, base)
            chosen = codecs.get(name) if isinstance(codecs, dict) else codecs
            change = change_of(kind, form.dtype, before, bits)
            writer.add(spec, blocks_of(kind, spec, change, before, chosen))
        if shards is not None:
            writer.add_shards(shards)
        if files is not None:
            writer.add_files(files)
    return path


def side_file(name: str, content: bytes, *, stored: bool = True) -> SideFile:
    return SideFile(name, hashlib.sha256(content).hexdigest(), content if stored else None)


def read(path: Path, base: Path | None = None) -> Document:
    """Read a file into a JSON document. Values are given as the hexadecimal digits of their little-endian bytes.

    Args:
        path: The file.
        base: A checkpoint file with the base, for a patch that needs it.
    """
    reader = LotaReader(path)
    tensors = {}
    file = SafetensorsFile(base) if base else None
    held = {} if file is None else {name: Dense(info.form, file.bits(name)) for name, info in file.tensors.items()}
    for name, spec in reader.specs.items():
        needed = base_bits(spec, held) if reader.header.kind == "patch" else None
        change = reader.change(name, base=needed)
        tensors[name] = {
            "dtype": spec.dtype.name,
            "shape": list(spec.shape),
            "origin": spec.origin and [spec.origin.dtype.name, list(spec.origin.shape)],
            "eligible": spec.eligible,
            "base": spec.base,
            "delta": _to_json(change.delta),
            "replacements": _to_json(change.replacements),
        }
    header, shards, files = reader.header, reader.shards(), reader.files()
    return {
        "kind": header.kind,
        "base": vars(header.base),
        "tuned": header.tuned and vars(header.tuned),
        "tensors": tensors,
        "removed": list(header.removed),
        "shards": None if shards is None else {name: content.hex() for name, content in shards.items()},
        "files": None
        if files is None
        else [[file.name, file.sha256, None if file.content is None else file.content.hex()] for file in files],
        "provenance": header.provenance,
    }


def _to_json(tensor: SparseTensor) -> Document:
    values = [tensor.values[place : place + 1].tobytes().hex() for place in range(len(tensor))]
    return {"positions": tensor.indices.tolist(), "values": values}


@dataclass
class Parts:
    """The parts of a `.lota` file, which can be changed and saved again. Saving recomputes digests and lengths.

    Attributes:
        description: The description as a JSON object, or the text to store instead.
        index: The index as a JSON object, or the bytes to store instead.
        blocks: The bytes of the blocks.
        claims: Fields of `index` in the description that are saved with these values instead of the correct ones.
        stored: The index as stored, in place of `index`.
        names: The names of the two tensors.
        dtypes: The dtypes of the two tensors.
    """

    description: Any
    index: Any
    blocks: bytes
    claims: Document = field(default_factory=dict)
    stored: bytes | None = None
    names: tuple[str, ...] = (INDEX, BLOCKS)
    dtypes: tuple[str, str] = ("U8", "U8")

    @classmethod
    def of(cls, path: Path) -> Parts:
        file = SafetensorsFile(path)
        index = bytes(file.bytes(INDEX))
        description = json.loads(file.metadata[KEY])
        if len(index) != description["index"]["size"]:
            index = zstandard.ZstdDecompressor().decompress(index)
        return cls(description, json.loads(index), bytes(file.bytes(BLOCKS)))

    def sign(self) -> None:
        """Set the digest of every block to that of its stored bytes."""
        offset = 0
        for tensor in self.index["tensors"]:
            for block in filter(None, tensor["blocks"]):
                length = sum(part[2] + part[4] for part in block[3:] if part)
                block[0] = stored_digest(self.blocks[offset : offset + length])
                offset += length

    def streams(self, name: str) -> list[bytes]:
        """Return the streams of a tensor's first block: positions and values of the deltas, then the replacements."""
        place, entries = self._find(name)
        found = []
        for part in entries:
            for length in (part[2], part[4]) if part else (0, 0):
                found.append(self.blocks[place : place + length])
                place += length
        return found

    def set_streams(self, name: str, streams: list[bytes]) -> None:
        """Replace the streams of a tensor's first block, and update their lengths and the digests."""
        place, entries = self._find(name)
        old = sum(map(len, self.streams(name)))
        self.blocks = self.blocks[:place] + b"".join(streams) + self.blocks[place + old :]
        for part, (positions, values) in zip(entries, (streams[:2], streams[2:]), strict=True):
            if part:
                part[2], part[4] = len(positions), len(values)
        self.sign()

    def _find(self, name: str) -> tuple[int, list[Any]]:
        place = 0
        for tensor in self.index["tensors"]:
            for block in filter(None, tensor["blocks"]):
                if tensor["name"] == name:
                    return place, block[3:]
                place += sum(part[2] + part[4] for part in block[3:] if part)
        raise KeyError(name)

    def tensor(self, name: str) -> Document:
        return next(tensor for tensor in self.index["tensors"] if tensor["name"] == name)

    def save(self, path: Path) -> Path:
        index = self.index if isinstance(self.index, bytes) else json.dumps(self.index).encode()
        stored = index if self.stored is None else self.stored
        text = self.description
        if not isinstance(text, str):
            claims = {"size": len(index), "sha256": hashlib.sha256(stored).hexdigest()} | self.claims
            if isinstance(text, dict) and isinstance(text.get("index"), dict):
                text = text | {"index": text["index"] | claims}
            text = json.dumps(text)
        sizes = dict(zip(self.names, (len(stored), len(self.blocks)), strict=False))
        layout = {
            name: (dtype, (size // DTYPES[dtype].itemsize,), size)
            for (name, size), dtype in zip(sizes.items(), self.dtypes, strict=False)
        }
        data = {INDEX: stored, BLOCKS: self.blocks}
        metadata = {KEY: text, DIGEST_KEY: hashlib.sha256(text.encode()).hexdigest()}
        content = b"".join(data.get(name, stored) for name in layout)
        path.write_bytes(encode_header(layout, metadata) + content)
        return path


VECTOR_BASE: Tensors = {
    "i": dense("I32", [1, 2, 3]),
    "p": reals("F32", [[1, 2, 3], [4, 5, 6]]),
    "w": reals("BF16", [[1, 2, 3], [4, 5, 0]]),
    "x": reals("F32", [1]),
}
VECTOR_TUNED: Tensors = {
    "i": dense("I32", [1, 2, 0xFFFFFFFF]),
    "p": reals("F32", [[1, 2.5, 3], [4, 5, 7]]),
    "w": dense("BF16", [0x3F81, 0x4000, 0x7FC1, 0x4080, 0x40A1, 0x8000], (2, 3)),
}
PATCH_BASE: Tensors = {"b": dense("BOOL", [0, 1]), "h": reals("BF16", [[1, 2, 3], [4, 5, 0]])}
PATCH_TUNED: Tensors = {
    "b": dense("BOOL", [1, 1]),
    "h": dense("BF16", [0x3F81, 0x4000, 0x403F, 0x4080, 0x40A2, 0x8000], (2, 3)),
}


def write_good(path: Path, kind: str) -> Path:
    """Write a small valid file of a kind."""
    if kind == "patch":
        return write_pair(path, "patch", PATCH_BASE, PATCH_TUNED, {"h": ("exponents", "steps")})
    return write_pair(
        path,
        "vector",
        VECTOR_BASE,
        VECTOR_TUNED,
        {"i": ("gaps", "packed"), "p": ("plain", "plain"), "w": ("gaps", "packed")},
        shards={"model.safetensors": b"a shard's header, " * 9},
        files=[side_file("README.md", b"as in the base", stored=False), side_file("config.json", b'{"a": [1]}' * 9)],
        provenance={"made_by": "hand"},
    )


Edit = Callable[[Parts], Any]


@dataclass(frozen=True)
class Defect:
    """A defect of a file, and the error that reading it must raise.

    Attributes:
        error: The class of the error.
        message: A regular expression for its message.
        edit: Introduces the defect into the parts of a valid file.
        kind: The kind of the file.
        raw: Introduces the defect into the bytes of a valid file, in place of `edit`.
    """

    error: type[FormatError]
    message: str
    edit: Edit | None = None
    kind: str = "vector"
    raw: Callable[[bytes], bytes] | None = None

    def write(self, path: Path) -> Path:
        write_good(path, self.kind)
        if self.raw:
            path.write_bytes(self.raw(path.read_bytes()))
        else:
            parts = Parts.of(path)
            self.edit(parts)
            parts.save(path)
        return path


def described(**fields: Any) -> Edit:
    return lambda parts: parts.description.update(fields)


def indexed(**fields: Any) -> Edit:
    return lambda parts: parts.index.update(fields)


def in_tensor(**fields: Any) -> Edit:
    return lambda parts: parts.tensor("w").update(fields)


def in_block(place: int, value: Any, name: str = "w") -> Edit:
    """Set a field of a block: digest, before, after, delta or replacements."""

    def edit(parts: Parts) -> None:
        parts.tensor(name)["blocks"][0][place] = value

    return edit


def in_delta(place: int, value: Any, name: str = "w") -> Edit:
    """Set a field of the deltas: their count, the codec and length of positions, or the codec and length of values."""

    def edit(parts: Parts) -> None:
        parts.tensor(name)["blocks"][0][3][place] = value

    return edit


def in_replacements(place: int, value: Any, name: str = "w") -> Edit:
    def edit(parts: Parts) -> None:
        parts.tensor(name)["blocks"][0][4][place] = value

    return edit


def in_file(place: int, value: Any, at: int = 1, key: str = "files") -> Edit:
    """Set a field of a side file: name, sha256 or blob."""

    def edit(parts: Parts) -> None:
        parts.index[key][at][place] = value

    return edit


def in_blob(place: int, value: Any) -> Edit:
    """Set a field of the blob of a side file: length, size or digest."""

    def edit(parts: Parts) -> None:
        parts.index["files"][1][2][place] = value

    return edit


def with_field(**fields: Any) -> Edit:
    """Set attributes of the parts."""

    def edit(parts: Parts) -> None:
        for key, content in fields.items():
            setattr(parts, key, content)

    return edit


def streams(name: str, change: Callable[[list[bytes]], list[bytes]]) -> Edit:
    return lambda parts: parts.set_streams(name, change(parts.streams(name)))


def index_text(old: str, new: str) -> Edit:
    def edit(parts: Parts) -> None:
        text = json.dumps(parts.index)
        assert old in text
        parts.index = text.replace(old, new, 1).encode()

    return edit


def description_text(old: str, new: str) -> Edit:
    def edit(parts: Parts) -> None:
        text = json.dumps(parts.description)
        assert old in text
        parts.description = text.replace(old, new, 1)

    return edit


def without(key: str, *path: str) -> Edit:
    """Remove a key from the description, or from the index if the path begins with `index`."""

    def edit(parts: Parts) -> None:
        place = parts.index if path[:1] == ("index",) else parts.description
        for step in path[1:]:
            place = parts.tensor("w") if step == "w" else place[step]
        place.pop(key)

    return edit


def swapped(key: str) -> Edit:
    return lambda parts: parts.index[key].reverse()


def null_block(parts: Parts) -> None:
    """Make a block without entries that is not null."""
    parts.index["tensors"][1]["blocks"][0][3:] = [None, None]


def many_entries(parts: Parts) -> None:
    """Declare more entries than a reader accepts, without any bytes."""
    tensor = parts.tensor("p")
    row = 1 << 22
    tensor["blocks"] += [["0" * 32, None, None, [row, "gaps", 0, "packed", 0], None]] * 17
    tensor["shape"] = [18, row]


def frame_claiming(size: int, content: bytes = b"") -> bytes:
    """Build a zstd frame that declares a size (RFC 8878).

    It consists of the magic number, a frame header with an 8-byte size and a single segment, the size, and one raw
    block.
    """
    block = (len(content) << 3 | 1).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd\xe0" + size.to_bytes(8, "little") + block + content


def bomb(parts: Parts) -> None:
    """Store a valid frame that expands by a larger factor than a reader allows."""
    size = 1 << 26
    parts.stored = zstandard.ZstdCompressor(level=19).compress(b" " * size)
    parts.claims = {"size": size}


def deep(parts: Parts) -> None:
    """Nest more lists than a recursive parser can handle."""
    parts.stored = zstandard.compress(b"[" * 200_000)
    parts.claims = {"size": 200_000}


def lying_frame(size: int, claim: int | None = None) -> Edit:
    """Store an empty frame that declares `size` bytes as the index; the description declares `claim` bytes."""
    return with_field(stored=frame_claiming(size), claims={"size": size if claim is None else claim})


def resigned_blob(parts: Parts, content: bytes, size: int) -> None:
    """Store other bytes, with a correct digest, for the last blob, that of a side file."""
    blob = parts.index["files"][1][2]
    parts.blocks = parts.blocks[: -blob[0]] + content
    blob[:] = [len(content), size, stored_digest(content)]


def altered_blob(parts: Parts) -> None:
    resigned_blob(parts, b"other content", 13)


def _gaps(first: int, second: int, _length: int) -> bytes:
    """Encode the positions of two entries, `first` and `first + second + 1`, as gaps."""
    frame = Frame(1, 1000, DTYPES["F32"])
    data = POSITION_CODECS["gaps"].encode(np.array([first, first + second + 1]), frame)
    assert data is not None
    return data


def _swap_parts(parts: Parts, name: str) -> None:
    block = parts.tensor(name)["blocks"][0]
    block[3], block[4] = block[4], block[3]


def _move_length(parts: Parts) -> None:
    """Make two lengths wrong, but not their sum."""
    delta = parts.tensor("p")["blocks"][0][3]
    delta[2] += 4
    delta[4] -= 4


def _unstore_shard(parts: Parts) -> None:
    """Remove the stored header of a shard."""
    blob = parts.index["shards"][0][2]
    files = sum(file[2][0] for file in parts.index["files"] if file[2])
    parts.blocks = parts.blocks[: -files - blob[0]] + parts.blocks[-files:]
    parts.index["shards"][0][2] = None


def _with_tensor(data: bytes) -> bytes:
    """Add an empty tensor to a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    end = len(data) - 8 - length
    header["w"] = {"dtype": "U8", "shape": [0], "data_offsets": [end, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _two_dimensions(data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[BLOCKS]["shape"].insert(0, 1)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


HUGE = 1 << 40
SHORT = "0123456789abcdef"
LAST_BLOB = "files: 'config.json'"
DEFECTS: dict[str, Defect] = {
    # the container
    "empty-file": Defect(NotSafetensorsError, "is not a safetensors file", raw=lambda data: b""),
    "truncated": Defect(NotSafetensorsError, "is not a safetensors file", raw=lambda data: data[:-1]),
    "bytes-after-the-end": Defect(NotSafetensorsError, "is not a safetensors file", raw=lambda data: data + b"\0"),
    "plain-safetensors": Defect(
        NotLotaError,
        "not a .lota file",
        raw=lambda data: encode_header({"w": ("U8", (1,), 1)}, {"format": "pt"}) + b"x",
    ),
    "no-blocks": Defect(
        HeaderError,
        "expected the tensors taskvec.index and taskvec.blocks, found taskvec.index$",
        with_field(names=(INDEX,)),
    ),
    "no-index": Defect(
        ChecksumError, "the index", raw=lambda data: data.replace(b'"taskvec.index"', b'"taskvec.indax"')
    ),
    "another-tensor": Defect(
        HeaderError,
        "found taskvec.blocks, taskvec.index, w$",
        raw=_with_tensor,
    ),
    "index-of-another-dtype": Defect(
        HeaderError, r"taskvec\.index must be U8 \[n\], found I8", with_field(dtypes=("I8", "U8"))
    ),
    "blocks-of-another-dtype": Defect(
        HeaderError, r"taskvec\.blocks must be U8 \[n\], found BOOL", with_field(dtypes=("U8", "BOOL"))
    ),
    "blocks-of-two-dimensions": Defect(
        HeaderError, r"taskvec\.blocks must be U8 \[n\], found U8 \[1, ", raw=_two_dimensions
    ),
    # the description
    "altered-description": Defect(
        ChecksumError, "description does not have the SHA-256", raw=lambda data: data.replace(b"made_by", b"made_of")
    ),
    "no-description-digest": Defect(
        ChecksumError,
        "description does not have the SHA-256",
        raw=lambda data: data.replace(b"taskvec.sha256", b"taskvec.sha255"),
    ),
    "description-not-json": Defect(HeaderError, "not valid JSON", description_text("}", "")),
    "description-duplicate-key": Defect(
        HeaderError, "'kind' occurs twice", description_text("{", '{"kind": "vector", ')
    ),
    "description-not-a-number": Defect(HeaderError, "NaN", described(provenance={"loss": float("nan")})),
    "description-infinite": Defect(HeaderError, "1e999", description_text('"hand"', "1e999")),
    "description-a-list": Defect(VersionError, "format version None", with_field(description=[])),
    "version-2.0": Defect(VersionError, "'2.0', this reader supports 1.x", described(version="2.0")),
    "version-0.1": Defect(VersionError, "'0.1', this reader supports 1.x", described(version="0.1")),
    "version-garbage": Defect(VersionError, "'1.0rc1'", described(version="1.0rc1")),
    "version-a-number": Defect(VersionError, "1.0", described(version=1.0)),
    "version-missing": Defect(VersionError, "None", without("version")),
    "kind-unknown": Defect(HeaderError, "kind is one of vector, patch, found 'mask'", described(kind="mask")),
    "kind-missing": Defect(HeaderError, "the description: expected the keys", without("kind")),
    "tuned-missing": Defect(HeaderError, "the description: expected the keys", without("tuned")),
    "description-extra-key": Defect(HeaderError, "the description: .*found .*surprise", described(surprise=1)),
    "base-null": Defect(HeaderError, "base must be dict", described(base=None)),
    "base-without-fingerprint": Defect(HeaderError, "base: expected the keys", described(base={"name": "b"})),
    "base-fingerprint": Defect(
        HeaderError, "base: not a digest: 'FF", described(base={"name": "b", "fingerprint": "F" * 64})
    ),
    "tuned-extra-key": Defect(
        HeaderError, "tuned: expected", described(tuned={"name": "b", "fingerprint": "0" * 64, "path": "x"})
    ),
    "provenance-a-list": Defect(HeaderError, "provenance must be dict", described(provenance=[])),
    # the index as a whole
    "index-digest": Defect(ChecksumError, "the index does not have", with_field(claims={"sha256": "0" * 64})),
    "index-digest-short": Defect(HeaderError, "index: not a digest", with_field(claims={"sha256": "0" * 63})),
    "index-size-one-more": Defect(
        HeaderError, "the index", lambda p: p.claims.update(size=len(json.dumps(p.index)) + 1)
    ),
    "index-size-one-less": Defect(
        HeaderError, "the index", lambda p: p.claims.update(size=len(json.dumps(p.index)) - 1)
    ),
    "index-size-negative": Defect(HeaderError, "an index of -1 bytes", with_field(claims={"size": -1})),
    "index-size-huge": Defect(HeaderError, f"an index of {HUGE} bytes", with_field(claims={"size": HUGE})),
    "index-size-true": Defect(HeaderError, "size must be int", with_field(claims={"size": True})),
    "index-extra-claim": Defect(HeaderError, "index: expected the keys", with_field(claims={"crc32": 0})),
    "index-null": Defect(HeaderError, "index must be dict", described(index=None)),
    "index-frame-claims-gigabytes": Defect(HeaderError, "the index claims", lying_frame(HUGE, 1000)),
    "index-frame-claims-64-mb": Defect(HeaderError, f"the index claims {1 << 26} bytes in", lying_frame(1 << 26)),
    "index-frame-is-empty": Defect(HeaderError, "the index", lying_frame(1 << 19)),
    "index-bomb": Defect(HeaderError, f"the index claims {1 << 26} bytes in", bomb),
    "index-frame-damaged": Defect(
        HeaderError, "the index is damaged", with_field(stored=b"not a frame of zstd", claims={"size": 1000})
    ),
    "index-frame-and-more": Defect(
        HeaderError,
        "the index is damaged",
        with_field(stored=frame_claiming(4, b"null") + b"\0", claims={"size": 4}),
    ),
    "index-not-json": Defect(HeaderError, "not valid JSON", with_field(index=b"{")),
    "index-not-utf-8": Defect(HeaderError, "not valid JSON", with_field(index=b'{"\xff": 1}')),
    "index-nests-deep": Defect(HeaderError, "not valid JSON", deep),
    "index-a-list": Defect(HeaderError, "the index: expected the keys.*list", with_field(index=b"[]")),
    "index-duplicate-key": Defect(
        HeaderError, "'removed' occurs twice", index_text('"removed"', '"removed": [], "removed"')
    ),
    "index-duplicate-key-in-a-tensor": Defect(
        HeaderError, "'dtype' occurs twice", index_text('"dtype": "BF16"', '"dtype": "BF16", "dtype": "BF16"')
    ),
    "index-missing-key": Defect(HeaderError, "the index: expected the keys", without("removed", "index")),
    "index-extra-key": Defect(HeaderError, "the index: expected the keys", indexed(surprise=1)),
    "lengths-too-short": Defect(
        HeaderError,
        "bytes of blocks, but the index describes",
        lambda parts: with_field(blocks=parts.blocks + b"\0")(parts),
    ),
    "lengths-too-long": Defect(
        HeaderError,
        "bytes of blocks, but the index describes",
        lambda parts: with_field(blocks=parts.blocks[:-1])(parts),
    ),
    # its tensors
    "tensors-an-object": Defect(HeaderError, "tensors must be list", indexed(tensors={})),
    "tensor-a-number": Defect(HeaderError, "tensor None: expected the keys", indexed(tensors=[1])),
    "tensors-out-of-order": Defect(HeaderError, "tensors are not in the order of their names", swapped("tensors")),
    "tensor-twice": Defect(
        HeaderError, "or one occurs twice", lambda parts: parts.index["tensors"].append(parts.index["tensors"][-1])
    ),
    "tensor-extra-key": Defect(HeaderError, "tensor 'w': expected the keys .* found .*surprise", in_tensor(surprise=1)),
    "tensor-missing-key": Defect(HeaderError, "tensor 'w': expected the keys", without("origin", "index", "w")),
    "tensor-name-with-a-newline": Defect(
        HeaderError, r"tensor 'w F32 \[2\]\\n' has the control character", in_tensor(name="w F32 [2]\n")
    ),
    "tensor-name-with-an-escape": Defect(
        HeaderError, r"tensor 'w\\x1b\[2J' has the control character", in_tensor(name="w\x1b[2J")
    ),
    "removed-name-with-a-newline": Defect(HeaderError, "control character", indexed(removed=["a\nb"])),
    "tensor-name-a-number": Defect(HeaderError, "tensor 7: name must be str", in_tensor(name=7)),
    "dtype-unknown": Defect(HeaderError, "tensor 'w': unknown dtype 'F4'", in_tensor(dtype="F4")),
    "dtype-a-list": Defect(HeaderError, r"tensor 'w': unknown dtype \['BF16'\]", in_tensor(dtype=["BF16"])),
    "shape-a-number": Defect(HeaderError, "tensor 'w': not a shape: 6", in_tensor(shape=6)),
    "shape-negative": Defect(HeaderError, r"tensor 'w': not a shape: \[-2, -3\]", in_tensor(shape=[-2, -3])),
    "shape-true": Defect(HeaderError, "tensor 'w': not a shape", in_tensor(shape=[True, 6])),
    "shape-a-float": Defect(HeaderError, "tensor 'w': not a shape", in_tensor(shape=[6.0])),
    "shape-too-large": Defect(HeaderError, f"tensor 'w' has {1 << 48} elements", in_tensor(shape=[1 << 24, 1 << 24])),
    "dimension-too-large": Defect(HeaderError, f"tensor 'w' has {1 << 48} elements", in_tensor(shape=[0, 1 << 48])),
    "dimensions-too-large": Defect(
        HeaderError,
        f"tensor 'w' has {1 << 94} elements, zero dimensions left out",
        in_tensor(shape=[1 << 47, 1 << 47, 0], origin=None, blocks=[]),
    ),
    "shape-of-65-dimensions": Defect(HeaderError, "tensor 'w' has 65 dimensions", in_tensor(shape=[1] * 65)),
    "origin-garbage": Defect(HeaderError, "tensor 'w': not an origin: 'other'", in_tensor(origin="other")),
    "origin-too-long": Defect(HeaderError, "tensor 'w': not an origin", in_tensor(origin=["F32", [1], 1])),
    "origin-dtype": Defect(HeaderError, "tensor 'w': unknown dtype 'F99'", in_tensor(origin=["F99", [1]])),
    "origin-shape": Defect(HeaderError, "tensor 'w': not a shape", in_tensor(origin=["F32", [-1]])),
    "eligible-a-number": Defect(HeaderError, "tensor 'w': eligible must be bool", in_tensor(eligible=1)),
    "base-digest": Defect(HeaderError, "tensor 'w': not a digest", in_tensor(base="b" * 15)),
    "delta-in-a-patch": Defect(
        HeaderError, "tensor 'h': additive entries in a patch of BF16", lambda p: _swap_parts(p, "h"), "patch"
    ),
    "delta-of-integers": Defect(
        HeaderError, "tensor 'i': additive entries in a vector of I32", lambda p: _swap_parts(p, "i")
    ),
    # blocks
    "blocks-too-many": Defect(
        HeaderError, "tensor 'w': 2 blocks, but its shape has 1", lambda p: p.tensor("w")["blocks"].append(None)
    ),
    "blocks-too-few": Defect(HeaderError, "tensor 'w': 0 blocks, but its shape has 1", in_tensor(blocks=[])),
    "blocks-of-an-empty-tensor": Defect(
        HeaderError, "tensor 'w': 1 blocks, but its shape has 0", in_tensor(shape=[0, 3], origin=["BF16", [0, 3]])
    ),
    "blocks-without-end": Defect(HeaderError, "tensor 'w': 1 blocks, but", in_tensor(shape=[(1 << 36) - 1])),
    "blocks-null": Defect(HeaderError, "tensor 'w': blocks must be list", in_tensor(blocks=None)),
    "block-too-short": Defect(
        HeaderError, "tensor 'w', block at 0: not a block", lambda p: p.tensor("w")["blocks"][0].pop()
    ),
    "block-an-object": Defect(HeaderError, "tensor 'w', block at 0: not a block", in_tensor(blocks=[{}])),
    "block-without-entries": Defect(HeaderError, "tensor 'p', block at 0: .* must be null", null_block),
    "block-digest": Defect(
        ChecksumError, "tensor 'w', block at element 0, byte .* the digest given in the index", in_block(0, "0" * 32)
    ),
    "block-digest-malformed": Defect(HeaderError, "tensor 'w', block at 0: not a digest", in_block(0, "0" * 31)),
    "before-malformed": Defect(HeaderError, "tensor 'w', block at 0: not a digest", in_block(1, SHORT.upper())),
    "after-malformed": Defect(HeaderError, "tensor 'w', block at 0: not a digest", in_block(2, 0)),
    "entries-a-number": Defect(HeaderError, "tensor 'w', block at 0: not entries", in_block(3, 1)),
    "entries-too-short": Defect(HeaderError, "tensor 'w', block at 0: not entries", in_block(3, [1, "gaps", 1])),
    "count-0": Defect(HeaderError, "tensor 'w', block at 0: 0 entries in 6 elements", in_delta(0, 0)),
    "count-negative": Defect(HeaderError, "tensor 'w', block at 0: -1 entries", in_delta(0, -1)),
    "count-too-large": Defect(HeaderError, "tensor 'w', block at 0: 7 entries in 6 elements", in_delta(0, 7)),
    "counts-too-large": Defect(HeaderError, "713031.. entries in blocks of .* bytes, at most 335.....", many_entries),
    "count-true": Defect(HeaderError, "tensor 'w', block at 0: True entries", in_delta(0, True)),
    "count-other": Defect(StreamError, "tensor 'p', block at element 0.*delta: ", in_delta(0, 1, "p")),
    "codec-of-positions-unknown": Defect(
        HeaderError, "tensor 'w', block at 0: unknown codec 'zip', .*gaps", in_delta(1, "zip")
    ),
    "codec-of-values-unknown": Defect(
        HeaderError, "tensor 'w', block at 0: unknown codec 'gaps', .*floats", in_delta(3, "gaps")
    ),
    "codec-a-list": Defect(HeaderError, "tensor 'w', block at 0: unknown codec", in_replacements(1, ["gaps"])),
    "length-negative": Defect(HeaderError, "tensor 'w', block at 0: not a length: -1", in_delta(2, -1)),
    "length-a-float": Defect(HeaderError, "tensor 'w', block at 0: not a length: 8.0", in_delta(4, 8.0)),
    "length-moved": Defect(StreamError, "tensor 'p', block at element 0.*delta: ", _move_length),
    # removed and files
    "removed-null": Defect(HeaderError, "removed must be list", indexed(removed=None)),
    "removed-numbers": Defect(HeaderError, "removed must be names", indexed(removed=[1])),
    "removed-out-of-order": Defect(HeaderError, "removed are not in the order", indexed(removed=["y", "x"])),
    "removed-twice": Defect(HeaderError, "removed are not in the order", indexed(removed=["x", "x"])),
    "files-an-object": Defect(HeaderError, "files must be list", indexed(files={})),
    "file-a-number": Defect(HeaderError, "files: not a file: 1", indexed(files=[1])),
    "file-name-a-number": Defect(HeaderError, "files: not a file", in_file(0, 7)),
    "files-out-of-order": Defect(HeaderError, "files are not in the order of their names", swapped("files")),
    "file-twice": Defect(HeaderError, "one occurs twice", lambda p: p.index["files"].insert(0, p.index["files"][0])),
    "file-sha256-malformed": Defect(HeaderError, "files: 'config.json': not a digest", in_file(1, "0" * 63)),
    "file-sha256": Defect(ChecksumError, "'config.json' does not have the SHA-256", in_file(1, "0" * 64)),
    "shard-sha256": Defect(ChecksumError, "'model.safetensors' does not have", in_file(1, "0" * 64, 0, "shards")),
    "shard-twice": Defect(
        HeaderError, "shards: one occurs twice", lambda p: p.index["shards"].append(p.index["shards"][0])
    ),
    "blob-longer-than-its-content": Defect(HeaderError, f"{LAST_BLOB}: not a blob", in_blob(0, 91)),
    "shard-not-stored": Defect(HeaderError, "shards: 'model.safetensors'", _unstore_shard),
    "blob-too-short": Defect(HeaderError, f"{LAST_BLOB}: not a blob", in_file(2, [1, 1])),
    "blob-negative": Defect(HeaderError, f"{LAST_BLOB}: not a blob", in_blob(0, -1)),
    "blob-size-beyond-2-48": Defect(HeaderError, f"of {(1 << 48) + 162} bytes, at most", in_blob(1, 1 << 48)),
    "blob-digest-malformed": Defect(HeaderError, f"{LAST_BLOB}: not a digest", in_blob(2, "x" * 32)),
    "blob-digest": Defect(
        ChecksumError, "'config.json': the stored bytes do not have the digest", in_blob(2, "0" * 32)
    ),
    "blob-size": Defect(HeaderError, "'config.json' claims 90 bytes, expected 91", in_blob(1, 91)),
    "blob-size-huge": Defect(HeaderError, f"of {HUGE + 162} bytes, at most", in_blob(1, HUGE)),
    "blob-expands-too-far": Defect(HeaderError, f"'config.json' claims {1 << 27} bytes in", in_blob(1, 1 << 27)),
    "blob-content": Defect(ChecksumError, "'config.json' does not have the SHA-256", altered_blob),
    "blob-claims-gigabytes": Defect(
        HeaderError, "'config.json' claims", lambda p: resigned_blob(p, frame_claiming(HUGE), 90)
    ),
    "blob-damaged": Defect(HeaderError, "'config.json' is damaged", lambda p: resigned_blob(p, b"not zstd", 90)),
    # streams
    "positions-not-increasing": Defect(
        StreamError,
        "tensor 'p', block at element 0, byte .* of the file: delta: indices are not strictly increasing",
        streams("p", lambda s: [np.array([5, 1], "<u4").tobytes(), *s[1:]]),
    ),
    "positions-twice": Defect(
        StreamError,
        "tensor 'p'.*not strictly increasing",
        streams("p", lambda s: [np.array([1, 1], "<u4").tobytes(), *s[1:]]),
    ),
    "position-beyond-the-end": Defect(
        StreamError,
        "tensor 'p'.*indices 1 to 6 are out of range for 6 positions",
        streams("p", lambda s: [np.array([1, 6], "<u4").tobytes(), *s[1:]]),
    ),
    "positions-cut-short": Defect(
        StreamError, "tensor 'p'.*delta: .*found 7 bytes", streams("p", lambda s: [s[0][:-1], *s[1:]])
    ),
    "positions-and-more": Defect(
        StreamError, "tensor 'p'.*delta: .*found 9 bytes", streams("p", lambda s: [s[0] + b"\0", *s[1:]])
    ),
    "positions-empty": Defect(StreamError, "tensor 'w'.*delta: ", streams("w", lambda s: [b"", *s[1:]])),
    "values-cut-short": Defect(
        StreamError, "tensor 'p'.*delta: .*found 7 bytes", streams("p", lambda s: [s[0], s[1][:-1], *s[2:]])
    ),
    "values-and-more": Defect(
        StreamError, "tensor 'w'.*replacements: ", streams("w", lambda s: [*s[:3], s[3] + b"\0"])
    ),
    "gap-width-3": Defect(
        StreamError, "tensor 'w'.*delta: .*found 3", streams("w", lambda s: [b"\3" + s[0][1:], *s[1:]])
    ),
    "gap-beyond-the-end": Defect(
        StreamError, "tensor 'w'.*delta: ", streams("w", lambda s: [_gaps(0, 200, len(s[0])), *s[1:]])
    ),
    "delta-not-a-number": Defect(
        StreamError,
        "tensor 'p'.*delta: nan at position 1 is not a finite number",
        streams("p", lambda s: [s[0], np.array([np.nan, 1], "<f4").tobytes(), *s[2:]]),
    ),
    "delta-infinite": Defect(
        StreamError,
        "tensor 'p'.*delta: -inf at position 5 is not a finite number",
        streams("p", lambda s: [s[0], np.array([1, -np.inf], "<f4").tobytes(), *s[2:]]),
    ),
    "codec-needs-a-base": Defect(StreamError, "tensor 'p'.*only with the base", in_delta(1, "exponents", "p")),
    "steps-in-a-vector": Defect(StreamError, "tensor 'p'.*only with the base", in_delta(3, "steps", "p")),
}
# a name must not point outside its folder
DEFECTS |= {
    f"{key[:-1]}-name-{number}": Defect(
        HeaderError, f"{key}: .* is not the name of a file", in_file(0, name, 1 if key == "files" else 0, key)
    )
    for key in ("files", "shards")
    for number, name in enumerate(
        ("", ".", "..", "a/b", "/etc/passwd", "../a", "..\\a", "a\0b", "a\nb", "\x1b[2J", "x" * 256), 1
    )
}
# a side file must not have a name under which programs look for weights or an index of weights
DEFECTS |= {
    f"files-name-of-weights-{number}": Defect(
        HeaderError, f"files: {name!r} is the name of a file of weights", in_file(0, name)
    )
    for number, name in enumerate(
        (
            *("model.safetensors", "pytorch_model.bin", "x.safetensors", "MODEL.SafeTensors", "consolidated.00.pth"),
            *("model.fp16.safetensors.index.json", "pytorch_model.bin.index.json", "Model.safetensors.index.json"),
            *("adapter_config.json", "tf_model.h5", "flax_model.msgpack", "model.gguf", "x.pkl", "other.lota"),
        ),
        1,
    )
}
DEFECTS |= {
    f"shards-name-of-no-shard-{number}": Defect(
        HeaderError, f"shards: {name!r} is not the name of a shard", in_file(0, name, 0, "shards")
    )
    for number, name in enumerate(("config.json", "model.bin", "model.safetensors.index.json", "m.SAFETENSORS"), 1)
}
