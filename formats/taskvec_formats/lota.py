"""Reading and writing `.lota` files: a safetensors container of U8 streams and the description in its metadata."""

from __future__ import annotations

import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from .atomic import atomic_file, naming
from .codecs import POSITION_CODECS, VALUE_CODECS
from .container import SafetensorsFile, encode_header
from .errors import ChecksumError, FormatError, HeaderError, StreamError
from .header import Base, Entries, Header, Stream, TensorSpec, encode, parse, stream_names
from .sparse import SparseTensor

_DELTA = np.dtype("<f4")
_PARTS = ("delta", "exceptions")


def _crc32(data: bytes | memoryview) -> str:
    return f"{zlib.crc32(data):08x}"


class LotaWriter:
    """Write a `.lota` file tensor by tensor; it appears at `path`, synced, when the `with` block ends without error.

    One tensor's entries are in memory at a time. The same calls give the same bytes.
    """

    def __init__(self, path: Path, base: Base, provenance: dict[str, Any] | None = None) -> None:
        self._path = path
        self._base = base
        self._provenance = provenance or {}
        self._specs: list[TensorSpec] = []
        self._streams: dict[str, tuple[str, tuple[int, ...], int]] = {}

    def __enter__(self) -> LotaWriter:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # the header comes first and needs every length, so the streams wait in an unnamed file on the same disk
        self._spool = tempfile.TemporaryFile(dir=self._path.parent)
        return self

    def add(self, spec: TensorSpec, delta: SparseTensor, exceptions: SparseTensor | None = None) -> None:
        """Append one tensor.

        spec: its name, dtype, shape and digests; `delta` and `exceptions` in it are filled in here.
        delta: f32 values. exceptions: carriers of the tensor's dtype.
        Raises StreamError where shapes or dtypes do not fit the spec, HeaderError for a name out of order.
        """
        if self._specs and spec.name <= self._specs[-1].name:
            raise HeaderError(f"tensor {spec.name!r} must not follow {self._specs[-1].name!r}")
        if len(delta) and not spec.dtype.additive:
            raise StreamError(f"tensor {spec.name!r}: additive entries in a tensor of {spec.dtype.name}")
        parts = {"delta": (delta, _DELTA), "exceptions": (exceptions, spec.dtype.carrier)}
        for part, (sparse, dtype) in parts.items():
            if sparse is not None and (sparse.shape != spec.shape or sparse.values.dtype != dtype):
                raise StreamError(
                    f"tensor {spec.name!r}: {part} must be {dtype} of shape {list(spec.shape)}, "
                    f"found {sparse.values.dtype} of {list(sparse.shape)}"
                )
        stored = [self._store(spec.name, part, sparse) for part, (sparse, _) in parts.items()]
        self._specs.append(replace(spec, delta=stored[0], exceptions=stored[1]))

    def _store(self, tensor: str, part: str, sparse: SparseTensor | None) -> Entries | None:
        if sparse is None or not len(sparse):
            return None
        positions, values = POSITION_CODECS["gaps"], VALUE_CODECS["planes"]
        carriers = sparse.values.view(f"<u{sparse.values.itemsize}")
        encoded = (
            (positions.name, positions.encode(sparse.indices, sparse.size)),
            (values.name, values.encode(carriers)),
        )
        streams = []
        for name, (codec, data) in zip(stream_names(tensor, part), encoded, strict=True):
            with naming(self._path):
                self._spool.write(data)
            self._streams[name] = ("U8", (len(data),), len(data))
            streams.append(Stream(codec, _crc32(data)))
        return Entries(len(sparse), *streams)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # closing the spool may be what finds the disk full
        with naming(self._path), self._spool:
            if kind is None:
                metadata = encode(Header(self._base, tuple(self._specs), self._provenance))
                parse(metadata)  # nothing is written that a reader would refuse
                with atomic_file(self._path) as temporary, open(temporary, "wb") as out:
                    out.write(encode_header(self._streams, metadata))
                    self._spool.seek(0)
                    shutil.copyfileobj(self._spool, out, 1 << 20)


class LotaReader:
    """A `.lota` file opened for reading: the description at once, a tensor's streams when asked for.

    path: where it is.
    header: the validated description.
    specs: tensor name -> TensorSpec.

    Raises a FormatError, naming the file, where container, description and streams do not fit each other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = SafetensorsFile(path)
        try:
            self.header = parse(self._file.metadata)
            self._check_streams()
        except FormatError as error:
            raise type(error)(f"{path}: {error}") from None
        self.specs = {spec.name: spec for spec in self.header.tensors}

    def _check_streams(self) -> None:
        expected = [
            stream
            for spec in self.header.tensors
            for part in _PARTS
            if getattr(spec, part) is not None
            for stream in stream_names(spec.name, part)
        ]
        if list(self._file.tensors) != expected:
            odd = sorted(set(expected) ^ set(self._file.tensors))
            raise HeaderError(f"the stored streams are not those described ({odd[0] if odd else 'their order'})")
        for name, info in self._file.tensors.items():
            if info.dtype.name != "U8" or len(info.shape) != 1:
                raise HeaderError(f"stream {name!r} must be U8 [n], found {info.dtype.name} {list(info.shape)}")

    def delta(self, name: str) -> SparseTensor:
        """The additive entries of a tensor, values f32; empty where it has none. Raises ChecksumError, StreamError."""
        spec = self.specs[name]
        return self._load(spec, "delta", spec.delta, _DELTA)

    def exceptions(self, name: str) -> SparseTensor:
        """The exact results that base + delta does not give, values as carriers of the tensor's dtype."""
        spec = self.specs[name]
        return self._load(spec, "exceptions", spec.exceptions, spec.dtype.carrier)

    def _load(self, spec: TensorSpec, part: str, entries: Entries | None, dtype: np.dtype[Any]) -> SparseTensor:
        if entries is None:
            return SparseTensor.empty(spec.shape, dtype)
        streams = zip(stream_names(spec.name, part), (entries.positions, entries.values), strict=True)
        positions, values = (self._stream(name, stream) for name, stream in streams)
        carrier = np.dtype(f"<u{dtype.itemsize}")
        try:
            indices = POSITION_CODECS[entries.positions.codec].decode(positions, entries.count, spec.size)
            bits = VALUE_CODECS[entries.values.codec].decode(values, entries.count, carrier)
            return SparseTensor(spec.shape, indices, bits.view(dtype))
        except StreamError as error:
            raise StreamError(f"{self.path}: tensor {spec.name!r}, {part}: {error}") from None

    def _stream(self, name: str, stream: Stream) -> memoryview:
        data = self._file.bytes(name)
        if _crc32(data) != stream.crc32:
            info = self._file.tensors[name]
            raise ChecksumError(f"{self.path}: stream {name!r}, bytes {info.start} to {info.stop}, is damaged (CRC-32)")
        return data

    def verify(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Decode every stream and raise the FormatError of the first that fails; progress(tensors done, tensors)."""
        for done, name in enumerate(self.specs):
            progress(done, len(self.specs))
            self.delta(name)
            self.exceptions(name)
        progress(len(self.specs), len(self.specs))
