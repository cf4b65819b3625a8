"""Serialize a Header to bytes and parse it: the description, in the safetensors metadata, and the index.

`encode` and `parse` are inverses; `parse` accepts only what `encode` can have written.

The digests form a tree. The SHA-256 stored next to the description covers the description, which contains the digest of
the index, which contains the digest of every block. If this one number is trusted, any single block can be verified on
its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from .blobs import pack_blob, unpack_blob
from .codecs import POSITION_CODECS, VALUE_CODECS
from .container import HEADER_BYTES, check_name, strict_json
from .dtypes import DTYPES
from .errors import ChecksumError, HeaderError, NotLotaError, VersionError
from .file_names import check_shard_name, check_side_file_name
from .forms import Form, check_shape
from .header import Blob, Block, EntryStreams, Header, Identity, StoredFile, Stream, TensorSpec

VERSION = (1, 0)
KINDS = ("vector", "patch")
KEY = "taskvec"
DIGEST_KEY = "taskvec.sha256"
_DESCRIPTION_BYTES, _DEPTH = 1 << 22, 400
# limits for an index in ASCII, and for other indexes, whose str takes up to four times the memory
INDEX_BYTES, _WIDE_INDEX_BYTES = 1 << 26, 1 << 24
_NAMES, _BLOCKS, _FILES = 1 << 18, 1 << 20, 1 << 14
# n entries take at most _STREAM_BYTES + n * _ENTRY_BYTES bytes with every codec
_STREAM_BYTES, _ENTRY_BYTES = 1 << 16, 32
# limits the time to read a file: compressed streams of equal entries take almost no bytes
_FREE_ENTRIES, _BYTE_ENTRIES = 1 << 25, 256
BLOB_BYTES = 1 << 28  # of all shard headers and side files together, which are kept in memory
_SHA256 = re.compile("[0-9a-f]{64}")
_STORED = re.compile("[0-9a-f]{32}")
_TOUCHED = re.compile("[0-9a-f]{16}")


def encode(header: Header) -> tuple[dict[str, str], bytes]:
    """Serialize a header.

    Size limits are checked by `parse`, not here.

    Args:
        header: The header.

    Returns:
        The safetensors metadata, and the stored index.

    Raises:
        HeaderError: The provenance cannot be represented as JSON.
    """
    index = _dump(
        {
            "tensors": [_tensor_json(tensor) for tensor in header.tensors],
            "removed": list(header.removed),
            "shards": _files_json(header.shards),
            "files": _files_json(header.files),
        }
    ).encode()
    stored = pack_blob(index)
    description = _dump(
        {
            "version": ".".join(map(str, VERSION)),
            "kind": header.kind,
            "base": _identity_json(header.base),
            "tuned": header.tuned and _identity_json(header.tuned),
            "index": {"size": len(index), "sha256": hashlib.sha256(stored).hexdigest()},
            "provenance": header.provenance,
        }
    )
    return {KEY: description, DIGEST_KEY: hashlib.sha256(description.encode()).hexdigest()}, stored


def _dump(document: dict[str, Any]) -> str:
    try:
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        # everything except the provenance consists of strings and integers
        raise HeaderError(f"the provenance cannot be stored as JSON: {error}") from None


def _identity_json(identity: Identity) -> dict[str, str]:
    return {"name": identity.name, "fingerprint": identity.fingerprint}


def _tensor_json(tensor: TensorSpec) -> dict[str, Any]:
    origin = tensor.origin and [tensor.origin.dtype.name, list(tensor.origin.shape)]
    return {
        "name": tensor.name,
        "dtype": tensor.dtype.name,
        "shape": list(tensor.shape),
        "origin": "same" if tensor.origin == tensor.form else origin,
        "eligible": tensor.eligible,
        "base": tensor.base,
        "blocks": [block and _block_json(block) for block in tensor.blocks],
    }


def _block_json(block: Block) -> list[Any]:
    parts = _entries_json(block.delta), _entries_json(block.replacements)
    return [block.digest, block.before, block.after, *parts]


def _entries_json(entries: EntryStreams | None) -> list[Any] | None:
    if entries is None:
        return None
    positions, values = entries.positions, entries.values
    return [entries.count, positions.codec, positions.length, values.codec, values.length]


def _files_json(files: tuple[StoredFile, ...] | None) -> list[Any] | None:
    if files is None:
        return None
    return [
        [file.name, file.sha256, file.blob and [file.blob.length, file.blob.size, file.blob.digest]] for file in files
    ]


def parse(metadata: dict[str, str], stored_index: bytes | memoryview) -> Header:
    """Parse the result of `encode`.

    Unknown fields are ignored if the file is of a later minor version.

    Args:
        metadata: The safetensors metadata.
        stored_index: The stored index.

    Returns:
        The header.

    Raises:
        NotLotaError: The metadata contain no description.
        ChecksumError: The description or the index was altered.
        VersionError: The file is of another major version.
        HeaderError: Anything else is invalid. The message names the tensor and the field.
    """
    if KEY not in metadata:
        raise NotLotaError("not a .lota file: a safetensors file without a taskvec description")
    text = metadata[KEY]
    if len(text) > _DESCRIPTION_BYTES:
        raise HeaderError(f"a description of {len(text)} characters, at most {_DESCRIPTION_BYTES} are read")
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get(DIGEST_KEY):
        raise ChecksumError(f"the description does not have the SHA-256 given in {DIGEST_KEY}")
    document = strict_json(text)
    later = _is_later(document.get("version") if isinstance(document, dict) else None)
    keys = ("base", "index", "kind", "provenance", "tuned", "version")
    top = _Fields("the description", document, later, *keys)
    kind = top.get("kind", str)
    if kind not in KINDS:
        raise HeaderError(f"kind is one of {', '.join(KINDS)}, found {kind!r:.80}")
    index = _Fields("the index", _index(top, stored_index, later), later, "files", "removed", "shards", "tensors")
    tensors = _tensors(index, kind, later)
    _check_order("tensors", [tensor.name for tensor in tensors])
    _check_entries(tensors)
    removed = index.get("removed", list)
    if len(removed) > _NAMES:
        raise HeaderError(f"{len(removed)} removed tensors, at most {_NAMES} are read")
    if not all(type(name) is str for name in removed):
        raise HeaderError(f"removed must be names, found {removed!r:.80}")
    for name in removed:
        check_name(name)
    _check_order("removed", removed)
    shards, files = _files(index, "shards", check_shard_name), _files(index, "files", check_side_file_name)
    _check_once("shards", [shard.name for shard in shards or ()])
    _check_order("files", [file.name for file in files or ()])
    total = sum(file.blob.size for file in (*(shards or ()), *(files or ())) if file.blob)
    if total > BLOB_BYTES:
        raise HeaderError(f"shard headers and side files of {total} bytes, at most {BLOB_BYTES} are read")
    tuned = None if top.value["tuned"] is None else _identity(top, "tuned", later)
    provenance = top.get("provenance", dict)
    _check_depth("provenance", provenance)
    return Header(kind, _identity(top, "base", later), tuned, tensors, tuple(removed), shards, files, provenance)


def _check_depth(what: str, value: Any) -> None:
    """Raise HeaderError if lists and objects are nested too deeply to be written as JSON again."""
    level = [value]
    for _ in range(_DEPTH):
        inner = (part for each in level for part in (each.values() if isinstance(each, dict) else each))
        level = [part for part in inner if isinstance(part, (dict, list))]
        if not level:
            return
    raise HeaderError(f"{what} is nested more than {_DEPTH} levels deep")


def _is_later(version: Any) -> bool:
    """Return whether a file is of a later minor version; raise VersionError for another major version."""
    found = re.fullmatch(r"(\d{1,6})\.(\d{1,6})", version) if isinstance(version, str) else None
    if found is None or int(found[1]) != VERSION[0]:
        raise VersionError(f"format version {version!r:.80}, this reader supports {VERSION[0]}.x")
    return int(found[2]) > VERSION[1]


def _index(top: _Fields, stored: bytes | memoryview, later: bool) -> Any:
    if len(stored) > INDEX_BYTES:
        raise HeaderError(f"an index of more than {INDEX_BYTES} stored bytes")
    fields = _Fields("index", top.get("index", dict), later, "sha256", "size")
    if hashlib.sha256(stored).hexdigest() != fields.hex("sha256", _SHA256):
        raise ChecksumError("the index does not have the SHA-256 given in the description")
    size = fields.get("size", int)
    if not 0 <= size <= INDEX_BYTES:
        raise HeaderError(f"an index of {size} bytes, expected 0 to {INDEX_BYTES}")
    try:
        text = unpack_blob(stored, size, "the index").decode()
    except UnicodeDecodeError as error:
        raise HeaderError(f"not valid JSON: {error}") from None
    if size > _WIDE_INDEX_BYTES and not text.isascii():
        raise HeaderError(f"an index of {size} bytes that are not all ASCII, at most {_WIDE_INDEX_BYTES} are read")
    return strict_json(text)


def _check_order(what: str, names: list[str]) -> None:
    if names != sorted(set(names)):
        raise HeaderError(f"{what} are not in the order of their names, or one occurs twice")


def _check_entries(tensors: Iterable[TensorSpec]) -> None:
    entries = length = 0
    for tensor in tensors:
        entries += tensor.entries + tensor.replaced
        length += tensor.length
    most = _FREE_ENTRIES + _BYTE_ENTRIES * length
    if entries > most:
        raise HeaderError(
            f"{entries} entries in blocks of {length} bytes, at most {most} are read; the codec 'plain' stays within "
            "this limit"
        )


def _check_once(what: str, names: list[str]) -> None:
    if len(names) != len(set(names)):
        raise HeaderError(f"{what}: one occurs twice")


class _Fields:
    """Typed access to a JSON object that must have the given keys, and no others unless the version is later."""

    def __init__(self, where: str, value: Any, later: bool, *keys: str) -> None:
        missing = not isinstance(value, dict) or any(key not in value for key in keys)
        if missing or (len(value) > len(keys) and not later):
            found = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise HeaderError(f"{where}: expected the keys {sorted(keys)}, found {found!s:.200}")
        self.where = where
        self.value = value

    def get(self, key: str, kind: type) -> Any:
        value = self.value[key]
        if type(value) is not kind:
            raise HeaderError(f"{self.where}: {key} must be {kind.__name__}, found {value!r:.80}")
        return value

    def hex(self, key: str, pattern: re.Pattern[str]) -> str:
        return _hex(self.where, self.get(key, str), pattern)


def _hex(where: str, value: Any, pattern: re.Pattern[str]) -> str:
    if type(value) is not str or not pattern.fullmatch(value):
        raise HeaderError(f"{where}: not a digest: {value!r:.80}")
    return value


def _touched(where: str, value: Any) -> str | None:
    return None if value is None else _hex(where, value, _TOUCHED)


def _identity(top: _Fields, key: str, later: bool) -> Identity:
    fields = _Fields(key, top.get(key, dict), later, "fingerprint", "name")
    return Identity(fields.get("name", str), fields.hex("fingerprint", _SHA256))


def _tensors(index: _Fields, kind: str, later: bool) -> tuple[TensorSpec, ...]:
    tensors, blocks = [], 0
    items = index.get("tensors", list)
    if len(items) > _NAMES:
        raise HeaderError(f"{len(items)} tensors, at most {_NAMES} are read")
    items.reverse()
    while items:
        # free each item once it is parsed: the JSON takes as much memory as the result
        tensors.append(_tensor(items.pop(), kind, later))
        blocks += len(tensors[-1].blocks)
        if blocks > _BLOCKS:
            raise HeaderError(f"the tensors have more than {_BLOCKS} blocks")
    return tuple(tensors)


def _tensor(item: Any, kind: str, later: bool) -> TensorSpec:
    name = item.get("name") if isinstance(item, dict) else None
    keys = ("base", "blocks", "dtype", "eligible", "name", "origin", "shape")
    fields = _Fields(f"tensor {name!r:.200}", item, later, *keys)
    form = _form(fields.where, fields.value["dtype"], fields.value["shape"])
    origin = fields.value["origin"]
    if origin is not None and origin != "same" and not (type(origin) is list and len(origin) == 2):
        raise HeaderError(f"{fields.where}: not an origin: {origin!r:.80}")
    blocks = fields.get("blocks", list)
    if len(blocks) != form.block_count:
        raise HeaderError(f"{fields.where}: {len(blocks)} blocks, but its shape has {form.block_count}")
    spec = TensorSpec(
        fields.get("name", str),
        form.dtype,
        form.shape,
        form if origin == "same" else origin and _form(fields.where, *origin),
        fields.get("eligible", bool),
        _touched(fields.where, fields.value["base"]),
        tuple(_block(fields.where, *pair) for pair in zip(blocks, form.blocks(), strict=True)),
    )
    check_name(spec.name)
    if spec.entries and (kind == "patch" or not spec.dtype.additive):
        raise HeaderError(f"{fields.where}: additive entries in a {kind} of {form.dtype.name}")
    return spec


def _form(where: str, dtype: Any, shape: Any) -> Form:
    if type(dtype) is not str or dtype not in DTYPES:
        raise HeaderError(f"{where}: unknown dtype {dtype!r:.80}")
    if type(shape) is not list or not all(type(n) is int and n >= 0 for n in shape):
        raise HeaderError(f"{where}: not a shape: {shape!r:.80}")
    check_shape(where, shape)
    return Form(DTYPES[dtype], tuple(shape))


def _block(where: str, value: Any, span: tuple[int, int]) -> Block | None:
    if value is None:
        return None
    start, stop = span
    where = f"{where}, block at {start}"
    if type(value) is not list or len(value) != 5:
        raise HeaderError(f"{where}: not a block: {value!r:.80}")
    digest, before, after, *parts = value
    delta, replacements = (_entries(where, part, stop - start) for part in parts)
    if delta is None and replacements is None:
        raise HeaderError(f"{where}: a block without changes must be null")
    return Block(_hex(where, digest, _STORED), delta, replacements, _touched(where, before), _touched(where, after))


def _entries(where: str, value: Any, size: int) -> EntryStreams | None:
    if value is None:
        return None
    if type(value) is not list or len(value) != 5:
        raise HeaderError(f"{where}: not entries: {value!r:.80}")
    count, positions, positions_length, values, values_length = value
    if type(count) is not int or not 0 < count <= size:
        raise HeaderError(f"{where}: {count!r:.80} entries in {size} elements")
    for codec, length, known in (
        (positions, positions_length, POSITION_CODECS),
        (values, values_length, VALUE_CODECS),
    ):
        if type(codec) is not str or codec not in known:
            raise HeaderError(f"{where}: unknown codec {codec!r:.80}, this reader supports {', '.join(sorted(known))}")
        if type(length) is not int or length < 0:
            raise HeaderError(f"{where}: not a length: {length!r:.80}")
        if length > _STREAM_BYTES + _ENTRY_BYTES * count:
            raise HeaderError(f"{where}: a stream of {length} bytes is too long for {count} entries")
    return EntryStreams(count, Stream(positions, positions_length), Stream(values, values_length))


def _files(index: _Fields, key: str, check: Callable[[str], None]) -> tuple[StoredFile, ...] | None:
    if index.value[key] is None:
        return None
    items = index.get(key, list)
    if len(items) > _FILES:
        raise HeaderError(f"{key}: {len(items)} files, at most {_FILES} are read")
    return tuple(_file(key, item, check) for item in items)


def _file(key: str, item: Any, check: Callable[[str], None]) -> StoredFile:
    if type(item) is not list or len(item) != 3 or type(item[0]) is not str:
        raise HeaderError(f"{key}: not a file: {item!r:.80}")
    name, sha256, blob = item
    where = f"{key}: {name!r:.80}"
    try:
        check(name)
    except HeaderError as error:
        raise HeaderError(f"{key}: {error}") from None
    if blob is None and key == "shards":
        raise HeaderError(f"{where}: the header of a shard must be stored")
    if blob is not None:
        numbers = blob[:2] if type(blob) is list and len(blob) == 3 else [None]
        if not all(type(number) is int and number >= 0 for number in numbers) or blob[0] > blob[1]:
            raise HeaderError(f"{where}: not a blob: {blob!r:.80}")
        if key == "shards" and blob[1] > HEADER_BYTES + 8:
            raise HeaderError(f"{where}: a header of {blob[1]} bytes, at most {HEADER_BYTES + 8} are read")
        blob = Blob(blob[0], blob[1], _hex(where, blob[2], _STORED))
    return StoredFile(name, _hex(where, sha256, _SHA256), blob)
