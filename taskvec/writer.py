"""The shards of a model with a task vector on it, written piece by piece."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

from taskvec_formats import Checkpoint, Form
from taskvec_formats.atomic import atomic_file
from taskvec_formats.checkpoint import begin_digest, fingerprint, tensor_digest
from taskvec_formats.parallel import ordered_map

from .application import Application
from .output import Output, Shard
from .progress import Progress
from .record import RecordedFolder
from .tensor import as_bytes
from .vector import TaskVector


class _Piece(NamedTuple):
    """A piece of a tensor of the result: block `number`, or all of it where that is None. place: its first byte."""

    name: str
    form: Form
    number: int | None
    place: int

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the tensor."""
        return self.number is None or self.form.block_count == 1

    @property
    def is_last(self) -> bool:
        """Whether the tensor ends with it."""
        return self.number is None or self.number == self.form.block_count - 1


class Writer:
    """Writes shards piece by piece, several at a time. total: the tensors in all of them."""

    def __init__(
        self,
        application: Application,
        vector: TaskVector,
        base: Checkpoint,
        output: Output,
        shards: Mapping[str, Shard],
        progress: Progress,
    ) -> None:
        self._application = application
        self._vector = vector
        self._base = base
        self._output = output
        self._shards = shards
        self._progress = progress
        self._done = 0
        forms = [form for shard in shards.values() for form in shard.tensors.values()]
        self.total = len(forms)
        # what is rounded is not the tuned checkpoint in any case
        self._proves = vector.header.tuned is not None and all(output.form(form) == form for form in forms)
        self._digests: dict[str, str] = {}
        # what is known to the bit is rounded from there; a sum is rounded once, to the dtype asked for
        self._sums = vector.header.tuned is None

    @property
    def fingerprint(self) -> str | None:
        """That of all that was written; None where there is nothing to compare it with."""
        if not self._proves:
            return None
        return fingerprint(self._digests)

    def write(self, folder: Path) -> None:
        """Write every shard into a folder that will be given up on an error."""
        for name, shard in self._shards.items():
            self._write(shard, folder / name)

    def write_missing(self, keep: RecordedFolder, folder: Path) -> None:
        """Write the shards that an earlier call did not finish; the folder stays where there is a finished one."""
        finished = {name for name, shard in self._shards.items() if self._is_finished(folder / name, shard)}
        try:
            keep.begin()
            for name, shard in self._shards.items():
                if name in finished:
                    for tensor in shard.tensors:
                        self._count(tensor)
                    continue
                with atomic_file(folder / name) as temporary:
                    self._write(shard, temporary)
        except BaseException:
            if not any(self._is_finished(folder / name, shard) for name, shard in self._shards.items()):
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _is_finished(self, path: Path, shard: Shard) -> bool:
        try:
            with open(path, "rb") as file:
                found = file.read(len(shard.header)), os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return False
        return found == (shard.header, self._output.length(shard))

    def _write(self, shard: Shard, path: Path) -> None:
        path.write_bytes(shard.header)
        # what comes from a file is quickly read: processes would wait for one another where they write
        is_stored = any(spec.blocks for spec in self._vector.specs.values())
        processes = self._vector.source.by_range and not is_stored
        with closing(ordered_map(partial(self._make, path), self._pieces(shard), processes=processes)) as written:
            for piece, digest in written:
                if not piece.is_last:
                    continue
                if self._proves:
                    self._digests[piece.name] = digest or _digest_of_pieces(path, piece)
                self._count(piece.name)

    def _count(self, name: str) -> None:
        self._done += 1
        self._progress("applying", self._done, self.total, name)

    def _pieces(self, shard: Shard) -> Iterator[_Piece]:
        place = len(shard.header)
        for name, form in shard.tensors.items():
            width = self._output.form(form).dtype.itemsize
            by_block = name in self._vector.specs or self._output.form(form) != form
            if by_block and form.size:
                yield from (_Piece(name, form, n, place + width * form.block(n)[0]) for n in range(form.block_count))
            else:
                yield _Piece(name, form, None, place)
            place += width * form.size

    def _make(self, path: Path, piece: _Piece) -> tuple[_Piece, str | None]:
        """Put a piece in its place in a file. Its digest where it is a whole tensor, and somebody is going to ask."""
        data = self._data(piece)
        with open(path, "r+b") as file:
            file.seek(piece.place)
            file.write(data)
        digest = tensor_digest(piece.name, piece.form, data) if self._proves and piece.is_whole else None
        if piece.name in self._base.tensors:
            self._base.release(piece.name)
        return piece, digest

    def _data(self, piece: _Piece) -> memoryview:
        if not piece.form.size:
            return memoryview(b"")
        if piece.number is None:
            return self._base.bytes(piece.name)
        spec = self._vector.specs.get(piece.name)
        if spec is not None and self._sums and self._output.form(piece.form) != piece.form:
            values = self._application.values(spec, piece.number)
            return as_bytes(self._output.rounded_values(piece.name, values, piece.form))
        if spec is not None:
            bits = self._application.range(spec, piece.number)
        else:
            bits = self._base.bits(piece.name)[slice(*piece.form.block(piece.number))]
        return as_bytes(self._output.rounded(piece.name, bits, piece.form))


def _digest_of_pieces(path: Path, last: _Piece) -> str:
    """The digest of a tensor of which the last piece has been written, as all others."""
    digest, form = begin_digest(last.name, last.form), last.form
    with open(path, "rb") as file:
        file.seek(last.place - form.block(form.block_count - 1)[0] * form.dtype.itemsize)
        for start, stop in form.blocks():
            digest.update(file.read((stop - start) * form.dtype.itemsize))
    return digest.hexdigest()
