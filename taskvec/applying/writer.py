"""Writing of the shards of a model with a task vector applied, piece by piece."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

from taskvec_formats import Form
from taskvec_formats.system.atomic import atomic_file
from taskvec_formats.system.parallel import ordered_map

from ..reporting.progress import Progress
from ..reporting.throughput import Throughput
from ..resume import RecordedFolder
from ..vectors.delta import as_bytes
from .plan import Plan
from .rounding import rounded, rounded_values
from .shards import Shard, file_bytes
from .verified import Application


class _Piece(NamedTuple):
    """A block of a tensor of the result, and the offset of its first byte in the file."""

    name: str
    form: Form
    number: int
    place: int

    @property
    def is_last(self) -> bool:
        """Whether it is the last block of the tensor."""
        return self.number == self.form.block_count - 1


class Writer:
    """Writes shards piece by piece, several pieces in parallel.

    Args:
        application: Computes the tuned bits.
        plan: The files to write.
        progress: Called for every tensor.

    Attributes:
        total: The number of tensors in all shards.
    """

    def __init__(self, application: Application, plan: Plan, progress: Progress) -> None:
        self._application = application
        self._vector, self._base, self._output, self._shards = plan.vector, plan.base, plan.output, plan.shards
        self._progress = progress
        self._done = 0
        self._rate = Throughput()
        self.total = sum(len(shard.tensors) for shard in plan.shards.values())
        # exact results are rounded from the tuned dtype; a sum is rounded only once, directly to the output dtype
        self._sums = plan.vector.header.tuned is None

    def write(self, folder: Path) -> None:
        """Write every shard into a folder that is discarded if an error is raised."""
        for name, shard in self._shards.items():
            self._write(shard, folder / name)

    def write_missing(self, keep: RecordedFolder, folder: Path) -> None:
        """Write the shards that an earlier call did not finish.

        If an error is raised, the folder is kept if it contains a finished shard.

        Args:
            keep: The recorded folder.
            folder: The path of the folder.
        """
        try:
            keep.begin()
            finished = {name for name, shard in self._shards.items() if self._is_finished(folder / name, shard)}
            for name, shard in self._shards.items():
                if name in finished:
                    for tensor in shard.tensors:
                        self._count(tensor)
                    continue
                with atomic_file(folder / name) as temporary:
                    self._write(shard, temporary)
        except BaseException:
            if not any(self._is_finished(folder / name, shard) for name, shard in self._shards.items()):
                keep.remove()
            raise

    def _is_finished(self, path: Path, shard: Shard) -> bool:
        try:
            with open(path, "rb") as file:
                found = file.read(len(shard.header)), os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return False
        return found == (shard.header, file_bytes(shard, self._output))

    def _write(self, shard: Shard, path: Path) -> None:
        path.write_bytes(shard.header)
        # entries from a file are decoded quickly, so the processes would only wait for each other to write
        processes = self._vector.source.by_range and not self._vector.is_stored
        with closing(ordered_map(partial(self._make, path), self._pieces(shard), processes=processes)) as written:
            for piece in written:
                if piece.is_last:
                    self._count(piece.name, piece.form.size * self._output.form(piece.form).dtype.itemsize)

    def _count(self, name: str, written: int = 0) -> None:
        self._done += 1
        rate = self._rate.after(written)
        self._progress("applying", self._done, self.total, ", ".join(part for part in (rate, name) if part))

    def _pieces(self, shard: Shard) -> Iterator[_Piece]:
        place = len(shard.header)
        for name, form in shard.tensors.items():
            width = self._output.form(form).dtype.itemsize
            if not form.size:
                self._count(name)
            yield from (_Piece(name, form, n, place + width * form.block(n)[0]) for n in range(form.block_count))
            place += width * form.size

    def _make(self, path: Path, piece: _Piece) -> _Piece:
        """Compute a piece and write it to its place in a file."""
        data = self._data(piece)
        with open(path, "r+b") as file:
            file.seek(piece.place)
            file.write(data)
        return piece

    def _data(self, piece: _Piece) -> memoryview:
        spec = self._vector.specs.get(piece.name)
        if spec is not None and self._sums and self._output.form(piece.form) != piece.form:
            values = self._application.values(spec, piece.number)
            return as_bytes(rounded_values(piece.name, values, piece.form, self._output))
        if spec is not None:
            bits = self._application.range(spec, piece.number)
        else:
            bits = self._base.bits(piece.name, *piece.form.block(piece.number))
        return as_bytes(rounded(piece.name, bits, piece.form, self._output))
