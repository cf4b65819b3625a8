"""A checkpoint whose tensors come from other checkpoints, under other names or in other dtypes, or are computed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from taskvec_formats import Checkpoint, Form
from taskvec_formats.container import TensorInfo, parse_header, shard_header, widest_first
from taskvec_formats.dtypes import BitArray, DType
from taskvec_formats.file_names import INDEX, SINGLE

from ..applying.rounding import round_to

_SINGLE = 5_000_000_000  # bytes; a model that was in one file is divided only beyond this size
# (first element, end of the range) -> carriers
Read = Callable[[int, int], BitArray]


@dataclass(frozen=True)
class Piece:
    """A tensor of an assembled checkpoint.

    Attributes:
        form: Its dtype and shape.
        read: Reads or computes a range.
    """

    form: Form
    read: Read


@dataclass(frozen=True)
class Planned:
    """A shard that is not written yet.

    Attributes:
        path: Its file name.
        header: Its header.
        tensors: Tensor name -> dtype, shape and place, in the order of the data.
    """

    path: Path
    header: bytes
    tensors: Mapping[str, TensorInfo]


class Assembled(Checkpoint):
    """A checkpoint that is read or computed tensor by tensor on demand.

    Args:
        name: The name for display.
        pieces: Tensor name -> Piece.
        like: The checkpoint whose folder the result resembles: its shards, if they contain tensors of the same names,
            and its side files.
        inputs: The files and folders that are read.
        description: A text that says how the tensors follow from the inputs.
        without: Names of side files of `like` that it does not have.
    """

    def __init__(
        self,
        name: str,
        pieces: Mapping[str, Piece],
        like: Checkpoint,
        inputs: Sequence[Path],
        description: str = "",
        without: Collection[str] = (),
    ) -> None:
        self.path, self.name = like.path, name
        self.left_out = like.left_out
        self._pieces = pieces
        self._inputs = tuple(inputs)
        self._description = description
        self.tensors = {key: TensorInfo.computed(pieces[key].form) for key in sorted(pieces)}
        self.shards = _shards(like, {key: piece.form for key, piece in pieces.items()})
        gone = {*without, *([] if pieces.keys() == like.tensors.keys() else [INDEX])}
        self.side_files = [file for file in like.side_files if file.name not in gone]

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files and folders that the checkpoint reads."""
        return self._inputs

    @property
    def is_written(self) -> bool:
        """False: the shards are planned."""
        return False

    @property
    def is_identified(self) -> bool:
        """True: computing all tensors only to compare them would take as long as writing them."""
        return True

    @property
    def identity(self) -> str:
        """A digest of the description, the forms of the tensors, and the paths, sizes and times of all inputs."""
        found = [f"{name} {info.form}" for name, info in self.tensors.items()]
        for path in sorted(set(self._inputs)):
            status = path.stat()
            found.append(f"{path.absolute()} {status.st_size} {status.st_mtime_ns}" if path.is_file() else str(path))
        return hashlib.sha256("\n".join([self._description, *found]).encode(errors="replace")).hexdigest()

    def bits(self, name: str, start: int = 0, stop: int | None = None) -> BitArray:
        """Read or compute the elements [start, stop) of a tensor."""
        piece = self._pieces[name]
        return piece.read(start, piece.form.size if stop is None else stop)


def taken(checkpoint: Checkpoint, name: str, dtype: DType | None = None) -> Piece:
    """Return a tensor of a checkpoint as a piece.

    Args:
        checkpoint: The checkpoint.
        name: The name of the tensor in it.
        dtype: The dtype to which its values are rounded, or None.

    Returns:
        The piece. Reading it raises DTypeError for a finite value that is beyond the range of the dtype.
    """
    form = checkpoint.tensors[name].form
    if dtype is None or dtype == form.dtype:
        return Piece(form, lambda start, stop: checkpoint.bits(name, start, stop))
    own, target = form.dtype, dtype

    def read(start: int, stop: int) -> BitArray:
        values = checkpoint.bits(name, start, stop).view(own.real).astype(own.compute)
        found = round_to(target, values, name)
        found[np.isnan(values)] = np.nan  # a single NaN, because machines convert NaN payloads differently
        bits: BitArray = found.view(target.carrier)
        return bits

    return Piece(Form(target, form.shape), read)


def _shards(like: Checkpoint, forms: Mapping[str, Form]) -> list[Planned]:
    """The shards of another checkpoint with these tensors; new ones of at most their size if the names differ."""
    if forms.keys() == like.tensors.keys() and like.shards:
        return [
            _planned(shard.path.name, {name: forms[name] for name in shard.tensors}, parse_header(shard.header)[0])
            if any(forms[name] != info.form for name, info in shard.tensors.items())
            else Planned(Path(shard.path.name), shard.header, shard.tensors)
            for shard in like.shards
        ]
    limit = max((_bytes(info.form for info in shard.tensors.values()) for shard in like.shards), default=0)
    if len(like.shards) < 2:
        limit = max(limit, _SINGLE)
    parts: list[dict[str, Form]] = [{}]
    for name in sorted(forms):
        if parts[-1] and _bytes([*parts[-1].values(), forms[name]]) > limit > 0:
            parts.append({})
        parts[-1][name] = forms[name]
    names = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    return [
        _planned(file, part, {"format": "pt"})
        for file, part in zip(names if len(parts) > 1 else [SINGLE], parts, strict=True)
    ]


def _planned(file: str, forms: Mapping[str, Form], metadata: dict[str, str]) -> Planned:
    header = shard_header(forms, metadata)
    tensors = parse_header(header)[1]
    return Planned(Path(file), header, {name: tensors[name] for name in widest_first(forms)})


def _bytes(forms: Iterable[Form]) -> int:
    return sum(form.size * form.dtype.itemsize for form in forms)
