"""Safetensors files as named byte ranges that are read on request, never as a whole.

Layout (https://github.com/huggingface/safetensors#format): 8 bytes with the little-endian length n of the header; n
bytes of JSON; the data, which the tensors cover without gap or overlap. The safetensors library, a hardened parser,
checks this first. It does not report the byte range of a tensor, and it accepts repeated keys (the last one wins), so
this module parses the JSON itself afterwards.

Bytes are read, not memory-mapped: if another program truncates the file during reading, the result is an exception
instead of a SIGBUS that ends the process. A file that is modified after it was opened is rejected, because the checks
were made on its earlier content (`reading`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from .dtypes import DTYPES, BitArray, DType
from .errors import FormatError, HeaderError, NotSafetensorsError
from .forms import Form, check_shape
from .reading import LocalFile, Readable

METADATA = "__metadata__"
HEADER_BYTES = 100_000_000  # limit of the safetensors library
_VALUES = 3_500_000
_CHUNK = 1 << 22  # bytes that are hashed at a time
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class TensorInfo:
    """Dtype, shape and byte range of one tensor in a safetensors file.

    Attributes:
        dtype: The dtype.
        shape: The shape.
        start: First byte of the tensor, counted from the start of the file.
        stop: Byte after the last one, counted from the start of the file.
    """

    dtype: DType
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def form(self) -> Form:
        """Dtype and shape of the tensor."""
        return Form(self.dtype, self.shape)

    @classmethod
    def computed(cls, form: Form) -> TensorInfo:
        """Describe a tensor that is in no file. Its byte range begins at 0.

        Args:
            form: The dtype and shape of the tensor.
        """
        return cls(form.dtype, form.shape, 0, form.size * form.dtype.itemsize)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise HeaderError(f"the key {repeated!r:.200} occurs twice")
    return keys


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise HeaderError(f"{text} is not a finite number")
    return number


def strict_json(text: str | bytes) -> Any:
    """Parse JSON strictly, with a limit on the number of objects that parsing creates.

    Args:
        text: JSON as str or as UTF-8 bytes. It may have at most 3,500,000 commas, colons and opening brackets, which
            bound the number of objects.

    Returns:
        The document.

    Raises:
        HeaderError: The text exceeds the limit, is malformed or nested too deeply, or has a repeated key or a number
            outside the range of f64.
    """
    try:
        text = text if isinstance(text, str) else text.decode()
        values = sum(map(text.count, ",:[{"))
        if values > _VALUES:
            raise ValueError(f"{values} commas, colons and opening brackets; at most {_VALUES} are read")
        document = json.loads(text, object_pairs_hook=_no_duplicates, parse_float=_finite, parse_constant=_finite)
        if "\\u" in text:
            json.dumps(document, ensure_ascii=False).encode()  # fails for a lone surrogate, which no name can contain
        return document
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"not valid JSON: {error}") from None


def check_name(name: str) -> None:
    """Check that a tensor name has no control character (Unicode category Cc).

    Names are part of lines that are hashed. With a line break, one name could be mistaken for another tensor.

    Args:
        name: Name of the tensor.

    Raises:
        HeaderError: The name has a control character.
    """
    if found := _CONTROL.search(name):
        raise HeaderError(f"tensor {name!r:.200} has the control character {found[0]!r} in its name")


def parse_header(header: bytes) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Parse the header of a safetensors file.

    Args:
        header: First bytes of the file: the length prefix and the JSON.

    Returns:
        The metadata, and a mapping from name to TensorInfo in the order of the data.

    Raises:
        HeaderError: The bytes do not describe a safetensors file.
    """
    if len(header) < 8 or struct.unpack_from("<Q", header)[0] != len(header) - 8:
        raise HeaderError("the first 8 bytes are not the length of the header")
    entries = strict_json(header[8:])
    metadata = entries.pop(METADATA, None) or {} if isinstance(entries, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError("the header is not an object of tensors with string metadata")
    infos = [(name, _info(name, entry, len(header))) for name, entry in entries.items()]
    tensors = dict(sorted(infos, key=lambda item: (item[1].start, item[1].stop)))
    end = len(header)
    for name, info in tensors.items():
        if info.start != end:
            raise HeaderError(f"tensor {name!r} begins at byte {info.start}, expected byte {end}")
        end = info.stop
    return metadata, tensors


def _info(name: str, entry: Any, offset: int) -> TensorInfo:
    check_name(name)
    if not isinstance(entry, dict) or sorted(entry) != ["data_offsets", "dtype", "shape"]:
        raise HeaderError(
            f"tensor {name!r}: expected an object with data_offsets, dtype and shape, found {entry!r:.80}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise HeaderError(f"tensor {name!r} has dtype {dtype!r:.80}, which is not supported")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise HeaderError(f"tensor {name!r}: expected a list of sizes, found {numbers!r:.80}")
    check_shape(f"tensor {name!r}", shape)
    form = Form(DTYPES[dtype], tuple(shape))
    if len(offsets) != 2 or offsets[1] - offsets[0] != form.size * form.dtype.itemsize:
        raise HeaderError(f"tensor {name!r} of {form} has data_offsets {offsets!r:.80}, which do not match its size")
    return TensorInfo(form.dtype, form.shape, offset + offsets[0], offset + offsets[1])


class SafetensorsFile:
    """A safetensors file opened for reading.

    Args:
        place: Path of the file, or another place that its bytes are read from.
        most: Largest accepted header, in bytes.

    Attributes:
        path: Path of the file; the name of another place as a path, which leads nowhere.
        size: Size in bytes.
        header: First bytes of the file up to the data, including the length prefix.
        metadata: The free-form strings of `__metadata__`.
        tensors: Mapping from name to TensorInfo, in the order of the data.

    Raises:
        NotSafetensorsError: The path is not a readable regular file, or the file is not a safetensors file.
        HeaderError: The header has a repeated key, an unsupported dtype, or a name with a control character.
    """

    def __init__(self, place: Path | Readable, most: int = HEADER_BYTES) -> None:
        self._bytes = LocalFile(place) if isinstance(place, Path) else place
        self.path = path = Path(self._bytes.name)
        self.size = self._bytes.size
        length = int.from_bytes(self._bytes.read(0, min(8, self.size)), "little")
        if length > most:
            raise NotSafetensorsError(f"{path} is not a safetensors file with a header of at most {most} bytes")
        if isinstance(place, Path):
            _check(path, path)
            self.header = bytes(self._bytes.read(0, 8 + length))
        else:
            self.header = bytes(self._bytes.read(0, min(8 + length, self.size)))
            _check_copy(self.header, self.size, path)
        try:
            self.metadata, self.tensors = parse_header(self.header)
        except FormatError as error:
            raise type(error)(f"{path}: {error}") from None

    def bytes(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Read the bytes [start, stop) of a tensor.

        Args:
            name: Name of the tensor.
            start: First byte, counted from the start of the tensor.
            stop: Byte after the last one, counted from the start of the tensor; None for the end of the tensor.

        Returns:
            The bytes.

        Raises:
            NotSafetensorsError: The file cannot be read, or was changed after it was opened.
        """
        info = self.tensors[name]
        return self._bytes.read(info.start + start, info.stop if stop is None else info.start + stop)

    def sha256(self) -> str:
        """Compute the SHA-256 of the whole file, in hex.

        Raises:
            NotSafetensorsError: The file cannot be read, or was changed after it was opened.
        """
        digest = hashlib.sha256()
        for start in range(0, self.size, _CHUNK):
            digest.update(self._bytes.read(start, min(start + _CHUNK, self.size)))
        return digest.hexdigest()

    def bits(self, name: str, start: int = 0, stop: int | None = None) -> BitArray:
        """Read the elements [start, stop) of a tensor.

        Args:
            name: Name of the tensor.
            start: First element.
            stop: Element after the last one, None for the end of the tensor.

        Returns:
            A flat read-only array of the carrier type of the tensor's dtype, [stop − start].

        Raises:
            NotSafetensorsError: The file cannot be read, or was changed after it was opened.
        """
        carrier = self.tensors[name].dtype.carrier
        data = self.bytes(name, start * carrier.itemsize, None if stop is None else stop * carrier.itemsize)
        return np.frombuffer(data.toreadonly(), carrier)


def _check(file: Path, path: Path) -> None:
    """Check a file with the safetensors library; `path` names it in the error."""
    try:
        with safe_open(file, framework="np"):
            pass
    except SafetensorError as error:
        raise NotSafetensorsError(f"{path} is not a safetensors file ({error})") from None
    except OSError as error:
        raise NotSafetensorsError(f"{path} cannot be read ({error.strerror or error})") from None


def _check_copy(header: bytes, size: int, path: Path) -> None:
    """Check a file that is not on this machine: its header, before a hole of the size of its data."""
    with NamedTemporaryFile() as copy:
        try:
            copy.write(header)
            copy.flush()
            os.truncate(copy.name, size)
        except OSError as error:
            raise NotSafetensorsError(
                f"{path} of {size} bytes cannot be checked: {copy.name}: {error.strerror or error}"
            ) from None
        _check(Path(copy.name), path)


def encode_header(tensors: dict[str, tuple[str, tuple[int, ...], int]], metadata: dict[str, str]) -> bytes:
    """Build the header of a safetensors file.

    The JSON is padded with spaces so that the data begin at a multiple of 8, as in files of the safetensors library.

    Args:
        tensors: Mapping from name to (dtype name, shape, size in bytes), in the order of the data.
        metadata: The strings of `__metadata__`.

    Returns:
        First bytes of the file, including the length prefix.
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
    """Build the header of a safetensors file whose tensors follow in the order of `widest_first`.

    Args:
        forms: Mapping from tensor name to form.
        metadata: The strings of `__metadata__`.

    Returns:
        First bytes of the file, including the length prefix.
    """
    lengths = {name: forms[name].size * forms[name].dtype.itemsize for name in widest_first(forms)}
    return encode_header({n: (forms[n].dtype.name, forms[n].shape, length) for n, length in lengths.items()}, metadata)


def widest_first(forms: Mapping[str, Form]) -> list[str]:
    """Sort tensor names as the safetensors library does: larger item sizes first.

    In this order each tensor begins at a multiple of its item size.

    Args:
        forms: Mapping from tensor name to form.

    Returns:
        The sorted names.
    """
    return sorted(forms, key=lambda name: -forms[name].dtype.itemsize)
