"""The files of weightscope (`.wsp`): new weights at the positions that changed. The file is read as untrusted.

Layout, as weightscope 0.4 writes it (format version 0.2, https://github.com/weightscope/weightscope):

    4 bytes    "WSP2"
    4 bytes    little-endian length of the header
    header     JSON: version, threshold, tensors, only_in_a
    payload    one zstd stream, to the end of the file

`tensors` lists {kind, name, shape, dtype, blob_offset, blob_size}, where offset and size are bytes of the decompressed
payload. Kind "delta" adds n_changed, index_width and base_sha256; its blob is n_changed positions, u32 or u64, and as
many new weights. Kind "new" is a whole tensor. `only_in_a` lists the tensors of the base that the result lacks.
"""

from __future__ import annotations

import os
import re
import struct
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import zstandard

from taskvec_formats import Form
from taskvec_formats.container import HEADER_BYTES, check_name, strict_json
from taskvec_formats.dtypes import DTYPES, BitArray
from taskvec_formats.errors import HeaderError
from taskvec_formats.forms import check_shape

from ..errors import ConversionError

MAGIC, VERSION = b"WSP2", "0.2"
_CHUNK = 1 << 20
_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
}
_DELTA = {"blob_offset", "blob_size", "dtype", "kind", "name", "shape"}
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Record:
    """A tensor of a patch.

    Attributes:
        form: Its dtype and shape. The dtype is that of the stored weights.
        start: Its first byte in the payload.
        changed: The number of positions; None if the whole tensor is stored.
        width: Bytes per position.
        digest: SHA-256 of the tensor in the base, in hex.
    """

    form: Form
    start: int
    changed: int | None = None
    width: int = 4
    digest: str = ""

    @property
    def length(self) -> int:
        """The number of bytes in the payload."""
        if self.changed is None:
            return self.form.size * self.form.dtype.itemsize
        return self.changed * (self.width + self.form.dtype.itemsize)


class Patch:
    """An open `.wsp` file.

    Args:
        path: The file.
        most: The largest payload that is decompressed, in bytes.

    Attributes:
        path: As given.
        threshold: Changes up to this magnitude are not in the patch.
        removed: Names of the tensors of the base that the result lacks.
        records: Tensor name -> Record.

    Raises:
        ConversionError: The file is not a valid `.wsp` file, or has a payload of more than `most` bytes.
    """

    def __init__(self, path: Path, most: int) -> None:
        self.path = path
        try:
            opened = open(path, "rb")  # noqa: SIM115 - closed below
        except (OSError, ValueError) as error:
            raise ConversionError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
        with opened as file:
            start = file.read(8)
            if start[:4] != MAGIC or len(start) < 8:
                raise ConversionError(f"{path} is not a patch of weightscope: it does not begin with {MAGIC.decode()}")
            (length,) = struct.unpack("<I", start[4:])
            if length > min(HEADER_BYTES, os.fstat(file.fileno()).st_size):
                raise self._damaged(f"its header of {length} bytes is longer than the file")
            try:
                header = strict_json(file.read(length))
            except HeaderError as error:
                raise self._damaged(f"its header is {error}") from None
            self.threshold, self.removed, self.records = self._parsed(header)
            self._payload = self._decompressed(file, most)

    def _damaged(self, why: str) -> ConversionError:
        return ConversionError(f"{self.path} is not a valid patch of weightscope: {why}")

    def _parsed(self, header: Any) -> tuple[float, list[str], dict[str, Record]]:
        if not isinstance(header, dict) or header.get("version") != VERSION:
            found = header.get("version") if isinstance(header, dict) else header
            raise self._damaged(f"expected version {VERSION}, found {found!r:.80}")
        threshold, removed, listed = header.get("threshold"), header.get("only_in_a"), header.get("tensors")
        if not isinstance(threshold, (int, float)) or not isinstance(listed, list) or not isinstance(removed, list):
            raise self._damaged("its header lacks threshold, tensors or only_in_a")
        if not all(isinstance(name, str) for name in removed):
            raise self._damaged("only_in_a is not a list of names")
        records: dict[str, Record] = {}
        end = 0
        for entry in listed:
            name, record = self._record(entry, end)
            if name in records or name in removed:
                raise self._damaged(f"tensor {name!r:.200} is listed twice")
            records[name] = record
            end += record.length
        return float(threshold), removed, records

    def _record(self, entry: Any, start: int) -> tuple[str, Record]:
        """Parse the description of a tensor, whose blob must begin at `start`."""
        if not isinstance(entry, dict) or not entry.keys() >= _DELTA or not isinstance(entry["name"], str):
            raise self._damaged(f"expected the description of a tensor, found {entry!r:.80}")
        name, shape = entry["name"], entry["shape"]
        where = f"tensor {name!r:.200}"
        if entry["dtype"] not in _DTYPES:
            raise self._damaged(f"{where} has dtype {entry['dtype']!r:.80}, which is not supported")
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise self._damaged(f"{where} has the shape {shape!r:.80}")
        try:
            check_name(name)
            check_shape(where, shape)
        except HeaderError as error:
            raise self._damaged(str(error)) from None
        form = Form(DTYPES[_DTYPES[entry["dtype"]]], tuple(shape))
        if entry["kind"] == "new":
            record = Record(form, start)
        elif entry["kind"] == "delta":
            changed, width, digest = (entry.get(key) for key in ("n_changed", "index_width", "base_sha256"))
            if type(changed) is not int or not 0 <= changed <= form.size or width not in (4, 8):
                raise self._damaged(f"{where} has {changed!r:.80} positions of {width!r:.80} bytes in {form}")
            if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
                raise self._damaged(f"{where} has no SHA-256 of the base")
            record = Record(form, start, changed, width, digest)
        else:
            raise self._damaged(f"{where} is of the unknown kind {entry['kind']!r:.80}")
        if (entry["blob_offset"], entry["blob_size"]) != (start, record.length):
            raise self._damaged(
                f"{where} has {entry['blob_size']!r:.80} bytes at {entry['blob_offset']!r:.80}, expected "
                f"{record.length} at {start}"
            )
        return name, record

    def _decompressed(self, file: IO[bytes], most: int) -> int:
        """Decompress the payload, not further than the header says, to a temporary file, and return its descriptor."""
        wanted, done = sum(record.length for record in self.records.values()), 0
        if wanted > most:
            raise self._damaged(
                f"its header describes {wanted} bytes of payload; at most {most} are read for this base"
            )
        with tempfile.TemporaryFile() as payload:
            try:
                with zstandard.ZstdDecompressor().stream_reader(file) as reader:
                    while done <= wanted and (part := reader.read(_CHUNK)):
                        done += len(part)
                        payload.write(part)
            except zstandard.ZstdError as error:
                raise self._damaged(f"its payload cannot be decompressed ({error})") from None
            if done != wanted:
                more = "more" if done > wanted else f"only {done}"
                raise self._damaged(f"its header describes {wanted} bytes of payload, but it has {more}")
            payload.flush()
            descriptor = os.dup(payload.fileno())
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def _bytes(self, start: int, stop: int) -> bytes:
        return os.pread(self._payload, stop - start, start)

    def whole(self, record: Record, start: int, stop: int) -> BitArray:
        """Return the elements [start, stop) of a tensor that is stored as a whole."""
        width = record.form.dtype.itemsize
        data = self._bytes(record.start + start * width, record.start + stop * width)
        return np.frombuffer(data, record.form.dtype.carrier)

    def changes(self, name: str) -> tuple[np.ndarray[Any, Any], BitArray]:
        """Return the positions, int64 [n], and the new weights, carriers [n], of a tensor.

        Raises:
            ConversionError: The positions are not increasing, or out of range.
        """
        record = self.records[name]
        assert record.changed is not None
        middle = record.start + record.changed * record.width
        positions = np.frombuffer(self._bytes(record.start, middle), f"<u{record.width}").astype(np.int64)
        values = np.frombuffer(self._bytes(middle, record.start + record.length), record.form.dtype.carrier)
        if len(positions) and (
            positions[0] < 0 or positions[-1] >= record.form.size or (positions[1:] <= positions[:-1]).any()
        ):
            raise self._damaged(f"the positions of tensor {name!r} are not increasing or out of range")
        return positions, values
