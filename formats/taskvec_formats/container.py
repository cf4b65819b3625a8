"""A safetensors file as named byte ranges that are read when asked for, never as a whole.

The layout (https://github.com/huggingface/safetensors#format): 8 bytes, the little-endian length n of the header; n
bytes of JSON; the data, which the tensors cover without gap or overlap. The safetensors library, a hardened parser,
checks all of that first. It does not say where a tensor lies, and it takes the last of two equal keys, so the JSON is
then read here.

Bytes are read rather than mapped: a file that another program cuts off while it is read ends in an error, not in the
SIGBUS that would end the process. A file that is written to after it was opened is not read on either: what was checked
would not be what is used.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import struct
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from .dtypes import DTYPES, BitArray, DType
from .errors import FormatError, HeaderError, NotSafetensorsError
from .forms import Form, check_shape

METADATA = "__metadata__"
HEADER_BYTES = 100_000_000  # the most that the safetensors library reads
_VALUES = 3_500_000
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


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
    keys = dict(pairs)
    if len(keys) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise HeaderError(f"the key {twice!r:.200} occurs twice")
    return keys


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise HeaderError(f"{text} is not a number that JSON can hold")
    return number


def strict_json(text: str | bytes) -> Any:
    """Parse JSON of at most 3,500,000 commas, colons and opening brackets, which bound the objects that it becomes.

    Raises HeaderError where it is larger or malformed, has a key twice or a number beyond f64, or nests too deep.
    """
    try:
        text = text if isinstance(text, str) else text.decode()
        values = sum(map(text.count, ",:[{"))
        if values > _VALUES:
            raise ValueError(f"{values} commas, colons and opening brackets where at most {_VALUES} are read")
        document = json.loads(text, object_pairs_hook=_no_duplicates, parse_float=_finite, parse_constant=_finite)
        if "\\u" in text:
            json.dumps(document, ensure_ascii=False).encode()  # an escape may be half a pair, which no name can hold
        return document
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"not valid JSON: {error}") from None


def check_name(name: str) -> None:
    """Raise HeaderError for a tensor name with a control character (Unicode category Cc).

    Names stand in lines that are hashed: one with a line break could pass for another tensor.
    """
    if found := _CONTROL.search(name):
        raise HeaderError(f"tensor {name!r:.200} has the control character {found[0]!r} in its name")


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
    check_name(name)
    if not isinstance(entry, dict) or sorted(entry) != ["data_offsets", "dtype", "shape"]:
        raise HeaderError(f"tensor {name!r} is described by {entry!r:.80}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise HeaderError(f"tensor {name!r} has dtype {dtype!r:.80}, which is not supported")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise HeaderError(f"tensor {name!r}: expected a list of sizes, found {numbers!r:.80}")
    check_shape(f"tensor {name!r}", shape)
    form = Form(DTYPES[dtype], tuple(shape))
    if len(offsets) != 2 or offsets[1] - offsets[0] != form.size * form.dtype.itemsize:
        raise HeaderError(f"tensor {name!r} of {form} lies at {offsets!r:.80}")
    return TensorInfo(form.dtype, form.shape, offset + offsets[0], offset + offsets[1])


class SafetensorsFile:
    """A safetensors file opened for reading.

    Args:
        path: Where it is.
        most: The largest header, in bytes, that is read.

    Attributes:
        header: Its first bytes, length prefix included, up to the data.
        metadata: The free-form strings of `__metadata__`.
        tensors: Name -> TensorInfo, in the order in which the data lie.

    Raises:
        NotSafetensorsError: The path is not a regular file that can be read, or the file is not a safetensors file.
        HeaderError: A repeated key, a dtype that is not supported, or a name with a control character.
    """

    def __init__(self, path: Path, most: int = HEADER_BYTES) -> None:
        self.path = path
        try:
            # without O_NONBLOCK, opening a FIFO waits for somebody to write to it
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except (OSError, ValueError) as error:  # a ValueError for what cannot be a path
            raise NotSafetensorsError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
        weakref.finalize(self, os.close, self._file)
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode):
            raise NotSafetensorsError(f"{path} is not a regular file")
        self._written = status.st_mtime_ns
        length = int.from_bytes(self._read(0, 8, strict=False), "little")
        if length > most:
            raise NotSafetensorsError(f"{path} is not a safetensors file with a header of at most {most} bytes")
        try:
            with safe_open(path, framework="np"):
                pass
        except SafetensorError as error:
            raise NotSafetensorsError(f"{path} is not a safetensors file ({error})") from None
        except OSError as error:
            raise NotSafetensorsError(f"{path} cannot be read ({error.strerror or error})") from None
        self.header = bytes(self._read(0, 8 + length))
        try:
            self.metadata, self.tensors = parse_header(self.header)
        except FormatError as error:
            raise type(error)(f"{path}: {error}") from None

    def _read(self, start: int, stop: int, *, strict: bool = True) -> memoryview:
        """The bytes [start, stop) of the file; fewer where it ends early and this is not strict."""
        view, done = np.empty(stop - start, np.uint8).data, 0
        while done < len(view):
            try:
                count = os.preadv(self._file, [view[done:]], start + done)
            except OSError as error:
                raise NotSafetensorsError(f"{self.path} cannot be read ({error.strerror or error})") from None
            if not count:
                if not strict:
                    break
                raise NotSafetensorsError(f"{self.path} ends at byte {start + done}: it was cut off while it was read")
            done += count
        if os.fstat(self._file).st_mtime_ns != self._written:
            raise NotSafetensorsError(f"{self.path} was changed while it was read")
        return view[:done]

    def bytes(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        """The bytes [start, stop) of a tensor, read now. Raises NotSafetensorsError where the file was changed."""
        info = self.tensors[name]
        return self._read(info.start + start, info.stop if stop is None else info.start + stop)

    def bits(self, name: str, start: int = 0, stop: int | None = None) -> BitArray:
        """The elements [start, stop) of a tensor, read now, as a flat read-only array of its carrier."""
        carrier = self.tensors[name].dtype.carrier
        data = self.bytes(name, start * carrier.itemsize, None if stop is None else stop * carrier.itemsize)
        return np.frombuffer(data.toreadonly(), carrier)


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


def shard_header(forms: Mapping[str, Form], metadata: dict[str, str]) -> bytes:
    """The first bytes of a safetensors file whose tensors follow in the order of `widest_first`."""
    lengths = {name: forms[name].size * forms[name].dtype.itemsize for name in widest_first(forms)}
    return encode_header({n: (forms[n].dtype.name, forms[n].shape, length) for n, length in lengths.items()}, metadata)


def widest_first(forms: Mapping[str, Form]) -> list[str]:
    """Names in the order in which the safetensors library writes them: each lies at a multiple of its item size."""
    return sorted(forms, key=lambda name: -forms[name].dtype.itemsize)
