"""Interfaces and basic implementations of the sources that provide the entries of a task vector."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np

from taskvec_formats import Change, Header, Identity, Kind, LotaReader, SideFile, SparseTensor, TensorSpec
from taskvec_formats.forms import Bits

from ..errors import UsageError


class Reads(Protocol):
    """Anything that reads files: a source, a vector, a checkpoint."""

    @property
    def inputs(self) -> Sequence[Path]:
        """The files and folders that it reads, which no output may replace."""


def inputs_of(*readers: Reads) -> tuple[Path, ...]:
    """Return the files and folders that several objects read, each path once."""
    return tuple(dict.fromkeys(path for reader in readers for path in reader.inputs))


class Source(Reads, Protocol):
    """Provides the entries of a vector from a file, two checkpoints, or a merge. Implementations are thread-safe."""

    @property
    def by_range(self) -> bool:
        """Whether each range is computed independently, without state, so that processes can share the work."""

    @property
    def content(self) -> str | None:
        """A text that identifies the entries; None if the file or the provenance of the vector identifies them."""

    def change(self, name: str, start: int, stop: int, base: Bits | None = None) -> Change:
        """Return the change of the elements [start, stop) of a tensor.

        Args:
            name: The tensor.
            start: The first element.
            stop: The end of the range.
            base: The whole base tensor, which patches need.
        """

    def shards(self) -> dict[str, bytes] | None:
        """Return the headers of the tuned shards by file name; None if the result has the layout of the base."""

    def files(self) -> list[SideFile] | None:
        """Return the side files of the tuned checkpoint; None if they are those of the base."""


class Vector(Reads, Protocol):
    """The interface of a vector for the code that reads it (`vector.TaskVector`)."""

    name: str
    header: Header

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...
    @property
    def kind(self) -> Kind: ...
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
    """Base class of sources that provide entries only. The result has the layout of the base."""

    by_range = True
    inputs: Sequence[Path] = ()

    @property
    def content(self) -> str | None:
        return None

    def shards(self) -> dict[str, bytes] | None:
        return None

    def files(self) -> list[SideFile] | None:
        return None


class WholeTensors:
    """Ranges of changes that are computed one whole tensor at a time.

    A tensor is read range by range, so the last one is kept.

    Args:
        compute: Returns the change of a whole tensor, by name.
    """

    def __init__(self, compute: Callable[[str], Change]) -> None:
        self._computed = lru_cache(maxsize=1)(compute)
        self._lock = Lock()

    def change(self, name: str, start: int, stop: int) -> Change:
        """Return the change of the elements [start, stop) of a tensor."""
        with self._lock:
            whole = self._computed(name)
        return Change(whole.delta.slice_range(start, stop), whole.replacements.slice_range(start, stop))


class Stored:
    """A Source that reads a `.lota` file.

    Args:
        reader: The open file.

    Attributes:
        reader: As given.
        place: The absolute path of the file, or its reference on the Hub with its commit.
    """

    by_range = True
    content = None

    def __init__(self, reader: LotaReader) -> None:
        self.reader = reader
        # the working directory may change
        self.place = str(reader.path.absolute()) if reader.is_local else f"hf://{reader.path}"

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
    """A Source of deltas in memory.

    Args:
        deltas: Tensor name -> f32 deltas, flat or in the tensor's shape.
        specs: Tensor name -> spec.

    Raises:
        UsageError: The deltas of a tensor have another dtype or size, or belong to no tensor. The message names the
            tensor.
    """

    def __init__(self, deltas: Mapping[str, SparseTensor], specs: Mapping[str, TensorSpec]) -> None:
        for name, delta in deltas.items():
            if name not in specs:
                raise UsageError(f"deltas are given for {name!r}, which is not one of the tensors")
            if delta.values.dtype != np.float32 or delta.size != specs[name].size:
                form = f"F32 {list(specs[name].shape)}"
                raise UsageError(
                    f"tensor {name!r}: its deltas must be {form}, found {delta.values.dtype} {list(delta.shape)}"
                )
        self._deltas = deltas
        self._specs = specs

    @cached_property
    def content(self) -> str:
        return digest_of_entries(self._deltas[name] for name in self._specs if name in self._deltas)

    def change(self, name: str, start: int, stop: int, base: Bits | None = None) -> Change:
        delta = self._deltas.get(name) or SparseTensor.empty(self._specs[name].shape)
        return Change(delta.slice_range(start, stop), no_replacements(self._specs[name], stop - start))


def digest_of_entries(parts: Iterable[SparseTensor]) -> str:
    """Return the SHA-256 of the positions and values of several tensors, in this order, as hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.shape} {len(part)}".encode())
        digest.update(part.indices.tobytes())
        digest.update(part.values.tobytes())
    return digest.hexdigest()


def no_replacements(spec: TensorSpec, size: int) -> SparseTensor:
    """Return an empty list of replacements for a range of a tensor.

    Args:
        spec: The tensor.
        size: The number of elements of the range.
    """
    return SparseTensor.empty((size,), spec.dtype.carrier)
