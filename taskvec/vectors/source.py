"""Where the entries of a task vector come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from taskvec_formats import Change, Header, Identity, LotaReader, SideFile, SparseTensor, TensorSpec
from taskvec_formats.forms import Bits

from ..errors import UsageError


class Reads(Protocol):
    """What reads files: a source, a vector, a checkpoint."""

    @property
    def inputs(self) -> Sequence[Path]:
        """The files and folders that it reads, which no output may replace."""


def inputs_of(*readers: Reads) -> tuple[Path, ...]:
    """What several read together, each path once: vectors that are made of one another name the same ones."""
    return tuple(dict.fromkeys(path for reader in readers for path in reader.inputs))


class Source(Reads, Protocol):
    """Where a vector's entries come from: a file, two checkpoints, a merge. Safe to ask from several threads."""

    @property
    def by_range(self) -> bool:
        """Whether each range is computed by itself, nothing kept for the next: then processes can share the work."""

    def change(self, name: str, start: int, stop: int, base: Bits | None = None) -> Change:
        """What happens to the elements [start, stop) of a tensor. base: the whole base tensor, which patches need."""

    def shards(self) -> dict[str, bytes] | None:
        """The headers of the tuned shards by file name; None where the result is laid out as the base."""

    def files(self) -> list[SideFile] | None:
        """The side files of the tuned checkpoint; None where they are the base's."""


class Vector(Reads, Protocol):
    """What a vector offers to those that read it (`vector.TaskVector`)."""

    name: str
    header: Header

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...
    @property
    def kind(self) -> str: ...
    @property
    def base(self) -> Identity: ...
    @property
    def provenance(self) -> dict[str, Any]: ...
    @property
    def digest(self) -> str: ...
    @property
    def eligible(self) -> int: ...
    @property
    def is_stored(self) -> bool: ...
    def change(self, name: str, start: int = 0, stop: int | None = None) -> Change: ...


class DeltaSource:
    """A Source of entries alone: the result is laid out as the base."""

    by_range = True
    inputs: Sequence[Path] = ()

    def shards(self) -> dict[str, bytes] | None:
        return None

    def files(self) -> list[SideFile] | None:
        return None


class Stored:
    """A Source that is a `.lota` file."""

    by_range = True

    def __init__(self, reader: LotaReader) -> None:
        self.reader = reader

    @property
    def inputs(self) -> Sequence[Path]:
        return self.reader.inputs

    def change(self, name: str, start: int, stop: int, base: Bits | None = None) -> Change:
        return self.reader.change(name, start, stop, base)

    def shards(self) -> dict[str, bytes] | None:
        return self.reader.shards()

    def files(self) -> list[SideFile] | None:
        return self.reader.files()


class Memory(DeltaSource):
    """A Source held in memory: tensor name -> f32 deltas, flat or in the tensor's shape.

    Raises UsageError, naming the tensor, for deltas of another dtype or size, and for those of no tensor.
    """

    def __init__(self, deltas: Mapping[str, SparseTensor], specs: Mapping[str, TensorSpec]) -> None:
        for name, delta in deltas.items():
            if name not in specs:
                raise UsageError(f"there are deltas of {name!r}, which is none of the tensors")
            if delta.values.dtype != np.float32 or delta.size != specs[name].size:
                form = f"F32 {list(specs[name].shape)}"
                raise UsageError(
                    f"tensor {name!r}: its deltas must be {form}, found {delta.values.dtype} {list(delta.shape)}"
                )
        self._deltas = deltas
        self._specs = specs

    def change(self, name: str, start: int, stop: int, base: Bits | None = None) -> Change:
        delta = self._deltas.get(name) or SparseTensor.empty(self._specs[name].shape)
        return Change(delta.slice_range(start, stop), no_replacements(self._specs[name], stop - start))


def no_replacements(spec: TensorSpec, size: int) -> SparseTensor:
    """An empty list of replacements for a range of a tensor."""
    return SparseTensor.empty((size,), spec.dtype.carrier)
