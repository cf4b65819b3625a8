"""A safetensors file as named byte ranges, mapped, never read whole.

The layout (https://github.com/huggingface/safetensors#format): 8 bytes, the little-endian length n of the header; n
bytes of JSON; the data, which the tensors cover without gap or overlap. The safetensors library, a hardened parser,
checks all of that first. It does not say where a tensor lies, and it takes the last of two equal keys, so the JSON is
then read here.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from .dtypes import DTYPES, BitArray, DType
from .errors import FormatError, HeaderError, NotSafetensorsError
from .forms import Form

METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file: dtype, shape, and the byte range [start, stop) from the file's first byte."""

    dtype: DType
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def form(self) -> Form:
        """Dtype and shape."""
        return Form(self.dtype, self.shape)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for key, value in pairs:
        if key in keys:
            raise HeaderError(f"the key {key!r} occurs twice")
        keys[key] = value
    return keys


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise HeaderError(f"{text} is not a number that JSON can hold")
    return number


def strict_json(text: str | bytes) -> Any:
    """Parse JSON; HeaderError where it is malformed, has a key twice or a number beyond f64, or nests too deep."""
    try:
        document = json.loads(text, object_pairs_hook=_no_duplicates, parse_float=_finite, parse_constant=_finite)
        if (text.find("\\u") if isinstance(text, str) else text.find(b"\\u")) >= 0:
            json.dumps(document, ensure_ascii=False).encode()  # an escape may be half a pair, which no name can hold
        return document
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"not valid JSON: {error}") from None


def parse_header(header: bytes) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """The metadata of a safetensors file and its tensors, in the order of their data, from its first bytes.

    header: the length prefix and the JSON. Raises HeaderError where it describes no safetensors file.
    """
    if len(header) < 8 or struct.unpack_from("<Q", header)[0] != len(header) - 8:
        raise HeaderError("its first 8 bytes are not the length of the header")
    entries = strict_json(header[8:])
    metadata = entries.pop(METADATA, None) or {} if isinstance(entries, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError("the header is not an object of tensors, with metadata that are strings")
    infos = [(name, _info(name, entry, len(header))) for name, entry in entries.items()]
    tensors = dict(sorted(infos, key=lambda item: (item[1].start, item[1].stop)))
    end = len(header)
    for name, info in tensors.items():
        if info.start != end:
            raise HeaderError(f"tensor {name!r} begins at byte {info.start} where the one before ends at {end}")
        end = info.stop
    return metadata, tensors


def _info(name: str, entry: Any, offset: int) -> TensorInfo:
    if not isinstance(entry, dict) or sorted(entry) != ["data_offsets", "dtype", "shape"]:
        raise HeaderError(f"tensor {name!r} is described by {entry!r:.80}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise HeaderError(f"tensor {name!r} has dtype {dtype!r:.80}, which is not supported")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise HeaderError(f"tensor {name!r}: expected a list of sizes, found {numbers!r:.80}")
    form = Form(DTYPES[dtype], tuple(shape))
    if len(offsets) != 2 or offsets[1] - offsets[0] != form.size * form.dtype.itemsize:
        raise HeaderError(f"tensor {name!r} of {form} lies at {offsets!r:.80}")
    return TensorInfo(form.dtype, form.shape, offset + offsets[0], offset + offsets[1])


class SafetensorsFile:
    """A safetensors file opened for reading.

    path: where it is.
    header: its first bytes, length prefix included, up to the data.
    metadata: the free-form strings of `__metadata__`.
    tensors: name -> TensorInfo, in the order in which the data lie.

    Raises NotSafetensorsError where the file is not one, HeaderError for a repeated key or an unknown dtype.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="np"):
                pass
        except SafetensorError as error:
            raise NotSafetensorsError(f"{path} is not a safetensors file ({error})") from None
        except OSError as error:
            raise NotSafetensorsError(f"{path} cannot be read ({error.strerror or error})") from None
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        (length,) = struct.unpack_from("<Q", self._map)
        self.header = self._map[: 8 + length]
        try:
            self.metadata, self.tensors = parse_header(self.header)
        except FormatError as error:
            raise type(error)(f"{path}: {error}") from None

    def bytes(self, name: str) -> memoryview:
        """The raw bytes of a tensor, mapped: pages are read when touched."""
        info = self.tensors[name]
        return memoryview(self._map)[info.start : info.stop]

    def release(self, name: str) -> None:
        """Give back the memory of a tensor's pages: a map that was read whole otherwise counts as held."""
        info = self.tensors[name]
        # a tensor of no bytes may lie behind the last page
        if hasattr(mmap, "MADV_DONTNEED") and info.start < info.stop:
            start = info.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, info.stop - start)

    def bits(self, name: str) -> BitArray:
        """The tensor as a flat read-only array of its carrier: unsigned integers of its item size, [size]."""
        return np.frombuffer(self.bytes(name), self.tensors[name].dtype.carrier)


def encode_header(tensors: dict[str, tuple[str, tuple[int, ...], int]], metadata: dict[str, str]) -> bytes:
    """The first bytes of a safetensors file, length prefix included.

    tensors: name -> (dtype name, shape, bytes), in the order in which the data will follow.
    The JSON is padded with spaces so that the data begin on a multiple of 8, as the safetensors library does.
    """
    entries: dict[str, Any] = {METADATA: metadata} if metadata else {}
    offset = 0
    for name, (dtype, shape, size) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
