"""Vectors as coordinates in a safetensors file (docs/conversions.md).

For every tensor NAME of the vector, the file has three tensors:

    NAME.indices   I32 [n], or I64 [n] for a tensor of 2^31 elements or more: flat positions, row-major, increasing
    NAME.values    F32 [n]: tuned − base at these positions
    NAME.shape     I64 [dimensions]: the shape of the tensor

and the metadata {"format": "pt", "layout": "coo", "values": "delta", "base": fingerprint, "base_name": name}.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from taskvec_formats import Checkpoint, SparseTensor
from taskvec_formats.container import SafetensorsFile, encode_header
from taskvec_formats.system.atomic import atomic_file

from ..destination import appearing
from ..errors import BaseMismatchError, ConversionError
from ..quantised import hint
from ..reporting.progress import Progress, silent
from ..vectors.delta import as_bytes
from ..vectors.vector import TaskVector
from .entries import WholeEntries, counts_of, deltas_of, vector_from

INDICES, VALUES, SHAPE = ".indices", ".values", ".shape"
_LAYOUT = {"layout": "coo", "values": "delta"}
_BASE = "base"  # key of the metadata
_WIDE = 1 << 31
_INTEGERS = ("I32", "I64")
_FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class Coordinates:
    """A file of coordinates that was written.

    Attributes:
        path: The file.
        tensors: The number of tensors.
        entries: The number of entries.
        dropped: The number of replacements that coordinates cannot hold: elements that base + delta does not give
            exactly.
    """

    path: Path
    tensors: int
    entries: int
    dropped: int


def to_coo(vector: TaskVector, path: Path, progress: Progress = silent, *, force: bool = False) -> Coordinates:
    """Write the deltas of a vector as coordinates.

    Args:
        vector: The vector.
        path: The file to write.
        progress: Called for every tensor.
        force: Whether to replace an existing file.

    Returns:
        What was written.

    Raises:
        ConversionError: The vector adds, removes or resizes a tensor.
        KindError: It is a patch.
    """
    names = list(deltas_of(vector))
    counts, dropped = counts_of(vector, progress)
    parts: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for suffix in (SHAPE, INDICES, VALUES):  # the widest first, so that every tensor is aligned
        for name in sorted(names, key=lambda name: vector.specs[name].size < _WIDE):
            spec = vector.specs[name]
            dtype = {SHAPE: "I64", VALUES: "F32", INDICES: "I64" if spec.size >= _WIDE else "I32"}[suffix]
            length = len(spec.shape) if suffix == SHAPE else counts[name]
            parts[name + suffix] = (dtype, (length,), length * (8 if dtype == "I64" else 4))
    if len(parts) < 3 * len(names):
        raise ConversionError(f"{vector.name} has tensors whose names differ by {INDICES}, {VALUES} or {SHAPE} only")
    metadata = {"format": "pt", **_LAYOUT, _BASE: vector.base.fingerprint, "base_name": vector.base.name}
    header = encode_header(parts, metadata)
    with appearing(path), atomic_file(path, replace=force) as temporary, open(temporary, "wb") as file:
        file.write(header)
        places, place = {}, len(header)
        for part, (_, _, size) in parts.items():
            places[part], place = place, place + size
        file.truncate(place)
        for done, name in enumerate(names):
            progress("writing", done, len(names), name)
            spec, delta = vector.specs[name], vector.change(name).delta
            positions = delta.indices if spec.size >= _WIDE else delta.indices.astype(np.int32)
            held = {SHAPE: np.array(spec.shape, np.int64), INDICES: positions, VALUES: delta.values}
            for suffix, array in held.items():
                file.seek(places[name + suffix])
                file.write(as_bytes(np.ascontiguousarray(array)))
    progress("writing", len(names), len(names), "")
    return Coordinates(path, len(names), sum(counts[name] for name in names), dropped)


def is_coo(path: Path) -> bool:
    """Return whether a file contains coordinates by its metadata, so that its values are known to be deltas."""
    return path.is_file() and path.suffix == ".safetensors" and _says_delta(SafetensorsFile(path))


def _says_delta(file: SafetensorsFile) -> bool:
    return {key: file.metadata.get(key) for key in _LAYOUT} == _LAYOUT


def from_coo(
    path: Path,
    base: Checkpoint,
    sparsity: float | None = None,
    progress: Progress = silent,
    *,
    are_deltas: bool = False,
) -> TaskVector:
    """Return the vector of a file of coordinates.

    Files of other programs are read if they have the same names: NAME.shape may be missing; positions may be I32 or
    I64, flat [n] in any order or one row per dimension [dimensions, n]; values may be of any floating-point dtype.

    Args:
        path: The file.
        base: The base, a checkpoint or a single file.
        sparsity: As in `vector_from`.
        progress: Called while the base is hashed.
        are_deltas: Whether the values are deltas although the metadata does not say so.

    Raises:
        ConversionError: The file has other tensors than coordinates, or they do not fit the base. Reading or saving
            the vector raises it if positions are out of range or repeated, or a value is not finite.
        BaseMismatchError: The file names another base.
        UsageError: The sparsity is outside (0, 1).
        FormatError: The file is not a safetensors file.
    """
    file = SafetensorsFile(path)
    if not _says_delta(file) and not are_deltas:
        raise ConversionError(
            f"{path} does not say whether its values are deltas or new weights: if they are deltas, convert it as `coo`"
        )
    if (named := file.metadata.get(_BASE)) is not None and named != base.fingerprint and _says_delta(file):
        name = file.metadata.get("base_name", "another model")
        raise BaseMismatchError(f"{path} was taken from {name} ({named:.12}), not from {base.name}{hint(base)}")
    if (named is None or not _says_delta(file)) and (quantised := hint(base)):
        raise ConversionError(f"{path} does not name its base by fingerprint, so it may be another one{quantised}")
    names = _names(file, path)
    for name in names:
        if name not in base.tensors:
            raise ConversionError(f"{path} changes tensor {name!r}, which {base.name} does not have{hint(base)}")
        _check(file, path, name, base)
    forms = {name: base.tensors[name].form for name in names}
    entries = WholeEntries(lambda name: _read(file, path, name, base), forms, (*base.inputs, path))
    return vector_from(base, forms, entries, path, sparsity, progress)


def _names(file: SafetensorsFile, path: Path) -> list[str]:
    """Return the tensors that the file has coordinates of."""
    names = sorted(name.removesuffix(VALUES) for name in file.tensors if name.endswith(VALUES))
    expected = {name + suffix for name in names for suffix in (INDICES, VALUES, SHAPE)}
    for found in file.tensors:
        if found not in expected:
            raise ConversionError(
                f"{path} has tensor {found!r}, which is not NAME{INDICES}, NAME{VALUES} or NAME{SHAPE} of a tensor "
                "with coordinates"
            )
    for name in names:
        if name + INDICES not in file.tensors:
            raise ConversionError(f"{path} has {name + VALUES!r} without {name + INDICES!r}")
    return names


def _check(file: SafetensorsFile, path: Path, name: str, base: Checkpoint) -> None:
    """Check the forms of the coordinates of a tensor."""
    info = base.tensors[name]
    where, indices, values = f"{path}: tensor {name!r}", file.tensors[name + INDICES], file.tensors[name + VALUES]
    if not info.dtype.additive:
        raise ConversionError(f"{where} is {info.form} in {base.name}, to which nothing can be added")
    if indices.dtype.name not in _INTEGERS or values.dtype.name not in _FLOATS or len(values.shape) != 1:
        raise ConversionError(
            f"{where} has indices {indices.form} and values {values.form}; expected I32 or "
            "I64, and floating-point numbers [n]"
        )
    (count,) = values.shape
    if indices.shape not in ((count,), (len(info.shape), count)):
        raise ConversionError(
            f"{where} has {count} values but indices {list(indices.shape)}; expected [{count}] or "
            f"[{len(info.shape)}, {count}]"
        )
    if name + SHAPE in file.tensors:
        held = file.tensors[name + SHAPE]
        if held.dtype.name not in _INTEGERS or len(held.shape) != 1:
            raise ConversionError(f"{where} has the shape {held.form}; expected I32 or I64 [dimensions]")
        shape = tuple(int(size) for size in _numbers(file, name + SHAPE))
        if shape != info.shape:
            raise ConversionError(f"{where} is {list(shape)}, but {list(info.shape)} in {base.name}{hint(base)}")


def _numbers(file: SafetensorsFile, name: str) -> npt.NDArray[np.int64]:
    info = file.tensors[name]
    return file.bits(name).view(f"<i{info.dtype.itemsize}").astype(np.int64).reshape(info.shape)


def _read(file: SafetensorsFile, path: Path, name: str, base: Checkpoint) -> SparseTensor:
    """Return the deltas of a tensor, flat and in order."""
    where, shape = f"{path}: tensor {name!r}", base.tensors[name].shape
    positions, info = _numbers(file, name + INDICES), file.tensors[name + VALUES]
    sizes = np.array(shape if positions.ndim == 2 else [math.prod(shape)], np.int64)
    rows = positions if positions.ndim == 2 else positions[np.newaxis]
    if ((rows < 0) | (rows >= sizes[:, np.newaxis])).any():
        raise ConversionError(f"{where} has positions outside its shape {list(shape)}")
    positions = np.zeros(rows.shape[1], np.int64)
    for row, size in zip(rows, sizes, strict=True):
        positions = positions * size + row
    with np.errstate(over="ignore"):
        values = file.bits(name + VALUES).view(info.dtype.real).astype(np.float32)
    if not np.isfinite(values).all():
        raise ConversionError(f"{where} has a value that is not a finite number of f32")
    if (positions[1:] <= positions[:-1]).any():
        order = np.argsort(positions, kind="stable")
        positions, values = positions[order], values[order]
        if (positions[1:] == positions[:-1]).any():
            raise ConversionError(
                f"{where} has a position twice; it is uncertain whether the values are to be added or replaced"
            )
    return SparseTensor.owning((math.prod(shape),), positions, values)
