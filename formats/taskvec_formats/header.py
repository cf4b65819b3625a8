"""The description of a `.lota` file: the JSON string under `taskvec` in the safetensors metadata.

`encode` and `parse` are each other's inverse; `parse` accepts nothing that `encode` cannot have written, so that
whoever holds a Header need not check it again. The string's SHA-256 stands beside it under `taskvec.sha256`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from .codecs import POSITION_CODECS, VALUE_CODECS
from .container import strict_json
from .dtypes import DTYPES, DType
from .errors import ChecksumError, HeaderError, NotLotaError, VersionError

VERSION = "0.1"
KEY = "taskvec"
DIGEST_KEY = "taskvec.sha256"
_SHA256 = re.compile("[0-9a-f]{64}")
_CRC32 = re.compile("[0-9a-f]{8}")


@dataclass(frozen=True)
class Base:
    """The checkpoint a vector was taken from: its name, for people, and its fingerprint (Checkpoint.fingerprint)."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class Stream:
    """One stored stream: the codec that wrote it and the CRC-32 of its bytes, 8 hex digits."""

    codec: str
    crc32: str


@dataclass(frozen=True)
class Entries:
    """A stored sparse tensor: how many entries, and the streams of their positions and values."""

    count: int
    positions: Stream
    values: Stream


@dataclass(frozen=True)
class TensorSpec:
    """What a `.lota` file says of one tensor.

    name, dtype, shape: as in the base checkpoint.
    eligible: whether its weights could have been chosen; the density of a vector is counted over these.
    base: SHA-256 of the base's tensor (Checkpoint.digest), or None where the vector was made without the base at hand.
    tuned: the same of the tensor after exact application, or None where it is not known.
    delta: the additive entries, values f32; None for none.
    exceptions: positions whose exact result base + delta does not give, with the result's bits; None for none.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    eligible: bool = True
    base: str | None = None
    tuned: str | None = None
    delta: Entries | None = None
    exceptions: Entries | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def entries(self) -> int:
        """Number of additive entries."""
        return self.delta.count if self.delta else 0


@dataclass(frozen=True)
class Header:
    """The whole description. tensors: in the order of their names. provenance: how the vector came about, any JSON."""

    base: Base
    tensors: tuple[TensorSpec, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    kind: str = "vector"


def stream_names(tensor: str, part: str) -> tuple[str, str]:
    """Names of the position and value streams of `part` ("delta" or "exceptions") in the container."""
    return f"{tensor}/{part}.positions", f"{tensor}/{part}.values"


def encode(header: Header) -> dict[str, str]:
    """The safetensors metadata that describes the file."""
    document = {"version": VERSION, **asdict(header)}
    for tensor, spec in zip(document["tensors"], header.tensors, strict=True):
        tensor["dtype"] = spec.dtype.name
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {KEY: text, DIGEST_KEY: hashlib.sha256(text.encode()).hexdigest()}


def parse(metadata: dict[str, str]) -> Header:
    """Read the description back.

    Raises NotLotaError where there is none, ChecksumError where it was altered, VersionError for another format
    version, HeaderError, naming the tensor and the field, for anything else.
    """
    if KEY not in metadata:
        raise NotLotaError("not a .lota file: a safetensors file without a taskvec description")
    text = metadata[KEY]
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get(DIGEST_KEY):
        raise ChecksumError("the description does not have the SHA-256 that stands beside it")
    document = strict_json(text)
    version = document.get("version") if isinstance(document, dict) else None
    if version != VERSION:
        raise VersionError(f"format version {version!r}, this reader knows {VERSION!r}")
    top = _Fields("the description", document, "base", "kind", "provenance", "tensors", "version")
    base = _Fields("base", top.get("base", dict), "name", "fingerprint")
    kind = top.get("kind", str)
    if kind != "vector":
        raise HeaderError(f"kind is 'vector', found {kind!r}")
    tensors = tuple(_tensor(item) for item in top.get("tensors", list))
    names = [tensor.name for tensor in tensors]
    if names != sorted(set(names)):
        raise HeaderError("the tensors are not in the order of their names, or one occurs twice")
    return Header(
        Base(base.get("name", str), cast("str", base.hex("fingerprint", _SHA256))),
        tensors,
        top.get("provenance", dict),
        kind,
    )


class _Fields:
    """Typed access to a JSON object that must have exactly the named keys."""

    def __init__(self, where: str, value: Any, *keys: str) -> None:
        if not isinstance(value, dict) or sorted(value) != sorted(keys):
            found = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise HeaderError(f"{where}: expected the keys {sorted(keys)}, found {found}")
        self.where = where
        self.value = value

    def get(self, key: str, kind: type) -> Any:
        value = self.value[key]
        if type(value) is not kind:
            raise HeaderError(f"{self.where}: {key} must be {kind.__name__}, found {value!r:.80}")
        return value

    def hex(self, key: str, pattern: re.Pattern[str], *, optional: bool = False) -> str | None:
        if optional and self.value[key] is None:
            return None
        value: str = self.get(key, str)
        if not pattern.fullmatch(value):
            raise HeaderError(f"{self.where}: {key} is not a digest: {value!r:.80}")
        return value


def _tensor(item: Any) -> TensorSpec:
    name = item.get("name") if isinstance(item, dict) else None
    fields = _Fields(
        f"tensor {name!r}", item, "name", "dtype", "shape", "eligible", "base", "tuned", "delta", "exceptions"
    )
    dtype = fields.get("dtype", str)
    if dtype not in DTYPES:
        raise HeaderError(f"{fields.where}: unknown dtype {dtype!r}")
    shape = fields.get("shape", list)
    if not all(type(side) is int and 0 <= side < 1 << 48 for side in shape) or math.prod(shape) >= 1 << 48:
        raise HeaderError(f"{fields.where}: not a shape: {shape!r:.80}")
    size = math.prod(shape)
    spec = TensorSpec(
        fields.get("name", str),
        DTYPES[dtype],
        tuple(shape),
        fields.get("eligible", bool),
        fields.hex("base", _SHA256, optional=True),
        fields.hex("tuned", _SHA256, optional=True),
        _entries(fields, "delta", size),
        _entries(fields, "exceptions", size),
    )
    if spec.delta and not spec.dtype.additive:
        raise HeaderError(f"{fields.where}: additive entries in a tensor of {dtype}")
    return spec


def _entries(tensor: _Fields, key: str, size: int) -> Entries | None:
    if tensor.value[key] is None:
        return None
    where = f"{tensor.where}, {key}"
    fields = _Fields(where, tensor.value[key], "count", "positions", "values")
    count = fields.get("count", int)
    if not 0 < count <= size:
        raise HeaderError(f"{where}: {count} entries in a tensor of {size} elements")
    return Entries(
        count,
        _stream(where, "positions", fields.get("positions", dict), POSITION_CODECS),
        _stream(where, "values", fields.get("values", dict), VALUE_CODECS),
    )


def _stream(where: str, key: str, value: dict[str, Any], codecs: dict[str, Any]) -> Stream:
    fields = _Fields(f"{where}, {key}", value, "codec", "crc32")
    codec = fields.get("codec", str)
    if codec not in codecs:
        raise HeaderError(f"{fields.where}: unknown codec {codec!r}, this reader knows {sorted(codecs)}")
    return Stream(codec, cast("str", fields.hex("crc32", _CRC32)))
