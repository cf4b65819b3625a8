"""base + task vector -> checkpoint, and the proof that the base is the right one.

A vector fits every checkpoint that has the base's bits at the elements that the vector touches; so vectors whose masks
do not meet can be applied one after the other. The digest of those elements is checked before and after.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from taskvec_formats import Checkpoint, Form, TensorSpec
from taskvec_formats.atomic import atomic_directory, atomic_file
from taskvec_formats.blocks import touched_digest
from taskvec_formats.checkpoint import INDEX, begin_digest, fingerprint, short, tensor_digest
from taskvec_formats.container import parse_header
from taskvec_formats.dtypes import BitArray
from taskvec_formats.errors import ChecksumError, HeaderError, StreamError
from taskvec_formats.header import Block, stored_digest
from taskvec_formats.parallel import ordered_map
from taskvec_formats.sparse import Indices

from .errors import AlreadyAppliedError, BaseMismatchError, UsageError
from .output import AS_IT_IS, Files, Output, Shard
from .progress import Progress, silent
from .record import RecordedFolder
from .tensor import BaseBits, as_bytes, touched_bits
from .vector import TaskVector


@dataclass(frozen=True)
class Applied:
    """What came of it.

    exact: whether the result is the tuned checkpoint that the vector was taken from, every tensor, shard and side file
        byte for byte; None where the vector does not know one (trained, merged or sparsified).
    differences: why it is not, one sentence each: the base differs from the vector's in something it does not touch, or
        something was to be written otherwise.
    """

    exact: bool | None
    differences: tuple[str, ...] = ()


class Application:
    """A vector beside a base: the tuned bits of any range.

    Raises BaseMismatchError where a tensor is missing or has another dtype or shape, or other bits than expected.
    """

    def __init__(self, vector: TaskVector, base: Checkpoint, progress: Progress = silent) -> None:
        self._vector = vector
        self._base = base
        self._bits = BaseBits(base)
        for name, spec in vector.specs.items():
            if spec.origin is None:
                continue
            if name not in base.tensors:
                raise self._mismatch(f"it has no tensor {name!r}")
            if base.tensors[name].form != spec.origin:
                raise self._mismatch(f"tensor {name!r} should be {spec.origin}, found {base.tensors[name].form}")
        self._check_whole(progress)

    def _mismatch(self, why: str) -> BaseMismatchError:
        return _mismatch(self._vector, self._base, why)

    def _check_whole(self, progress: Progress) -> None:
        """Where a vector cannot vouch for the elements that it touches, as after a merge, whole tensors must agree."""
        specs = [spec for spec in self._vector.specs.values() if spec.origin and not _vouched(spec)]
        found = ordered_map(self._base.digest, (spec.name for spec in specs))
        for done, (spec, digest) in enumerate(zip(specs, found, strict=True)):
            progress("checking base", done, len(specs), spec.name)
            if spec.base is not None and short(digest) != spec.base:
                raise self._mismatch(f"tensor {spec.name!r} has other values")
        progress("checking base", len(specs), len(specs), "")
        if any(spec.base is None for spec in specs) and self._base.fingerprint != self._vector.base.fingerprint:
            raise self._mismatch("its fingerprint is another")

    def range(self, spec: TensorSpec, number: int) -> BitArray:
        """The tuned bits of block `number` of a tensor, new carriers; the errors of `touched`."""
        start, stop = spec.form.block(number)
        touched, _, after = self.touched(spec, number)
        tuned: BitArray = self._bits(spec)[start:stop].copy()
        tuned[touched] = after
        return tuned

    def touched(self, spec: TensorSpec, number: int) -> tuple[Indices, BitArray, BitArray]:
        """The elements that change in block `number` of a tensor: positions in it, carriers before and after.

        Raises AlreadyAppliedError where the base is the result already, ChecksumError where the result is not the one
        that the vector gives a digest for.
        """
        start, stop = spec.form.block(number)
        whole = self._bits(spec)
        base = whole[start:stop]
        try:
            change = self._vector.source.change(spec.name, start, stop, whole)
        except StreamError:
            self._check_origin(spec)
            raise
        touched = change.touched()
        before, after = touched_bits(spec.dtype, base, change)
        # a vector that is not from a file has no blocks yet: its entries come from this very base, or are checked whole
        block = spec.blocks[number] if spec.blocks else None
        if block and block.before is not None:
            self._check_touched(spec, start, block, before, after)
        return touched, before, after

    def _check_origin(self, spec: TensorSpec) -> None:
        """What is stored relative to a base need not decode beside another, which is no fault of the file."""
        tuned = self._vector.header.tuned
        if tuned and tuned.fingerprint == self._base.fingerprint:
            raise self._applied(spec)
        if spec.origin and spec.base is not None and short(self._base.digest(spec.name)) != spec.base:
            raise self._mismatch(f"tensor {spec.name!r} has other values")

    def _applied(self, spec: TensorSpec) -> AlreadyAppliedError:
        return AlreadyAppliedError(
            f"{self._vector.name} is applied to {self._base.name} already: tensor {spec.name!r} is the result's"
        )

    def _check_touched(self, spec: TensorSpec, start: int, block: Block, before: BitArray, after: BitArray) -> None:
        found = touched_digest(spec, start, before)
        if found not in (block.before, block.after):
            raise self._mismatch(f"tensor {spec.name!r} has other values where the vector changes it")
        if found != block.before:
            raise self._applied(spec)
        if touched_digest(spec, start, after) != block.after:
            raise ChecksumError(f"tensor {spec.name!r}: the result has not the digest that {self._vector.name} gives")

    def release(self, spec: TensorSpec) -> None:
        """Give back the memory of a tensor's pages."""
        self._bits.release(spec)


def _mismatch(vector: TaskVector, base: Checkpoint, why: str) -> BaseMismatchError:
    return BaseMismatchError(f"{base.name} is not the base of {vector.name} ({vector.base.name}): {why}")


def _vouched(spec: TensorSpec) -> bool:
    return bool(spec.blocks) and all(block is None or block.before is not None for block in spec.blocks)


def check_result(vector: TaskVector, base: Checkpoint, progress: Progress = silent) -> None:
    """Apply every block in memory and compare it with its digests; the errors of `apply`, nothing written."""
    application = Application(vector, base, progress)

    def check(spec: TensorSpec) -> None:
        for number in range(spec.form.block_count):
            application.touched(spec, number)
        application.release(spec)

    for done, _ in enumerate(ordered_map(check, vector.specs.values()), 1):
        progress("applying", done, len(vector.specs), "")


def apply(
    vector: TaskVector,
    base: Checkpoint,
    out: Path,
    progress: Progress = silent,
    output: Output = AS_IT_IS,
    *,
    work: Path | None = None,
    record: Mapping[str, Any] | None = None,
) -> Applied:
    """Write the folder `out`: the base with the vector applied; shards and side files as in the tuned checkpoint.

    Where the vector knows no tuned checkpoint, shards and side files are the base's. Memory: a few blocks.
    `out` appears when complete; a folder that was there is replaced then.
    output: what to write otherwise: the size of shards, the dtype, the card.
    work: a folder on the same disk, where finished shards wait for the others after an interruption; the same call goes
        on with those that are missing, to the same bytes. It is gone when `out` is there, or when nothing was finished.
        Not for a vector that knows a tuned checkpoint, which is compared as it is written.
    record: with `work`, what the vector comes from, as JSON; the base and the output are recorded in any case.
    Raises BaseMismatchError and FormatError; DTypeError where a value does not fit; ResumeError where `work` is that of
    another call; UsageError for `work` beside a vector that knows its result, and for a quantised base that is to have
    another dtype. Nothing is left behind then but finished shards in `work`.
    """
    if work is not None and vector.header.tuned is not None:
        raise UsageError(f"{vector.name} knows the checkpoint that it gives: it is written at one go, not resumed")
    stored = vector.source.shards()
    files, differences = _side_files(vector, base, laid_out_anew=stored is not None)
    written = output.files(files, base.name)
    if work is not None:
        base.digests(lambda done, total: progress("hashing base", done, total, ""))
    application = Application(vector, base, progress)
    whole = _layout(vector, base, stored)
    shards = output.shards(whole)
    written |= output.index(written, shards)
    writer = _Writer(application, vector, base, output, shards, progress)
    if work is None:
        with atomic_directory(out) as folder:
            writer.write(folder)
            _write_files(written, folder)
    else:
        layout = {name: stored_digest(shard.header) for name, shard in shards.items()}
        settings = {"dtype": output.dtype, "shard_size": output.shard_size, "shards": layout}
        writer.write_missing(
            RecordedFolder(work, {**(record or {}), "base": base.fingerprint, "output": settings}), work
        )
        with atomic_directory(out) as folder:
            _write_files(written, folder)
            for name in shards:
                os.rename(work / name, folder / name)
        shutil.rmtree(work, ignore_errors=True)
    progress("applying", writer.total, writer.total, "")
    if vector.header.tuned is None:
        return Applied(None, tuple(differences))
    if writer.fingerprint not in (None, vector.header.tuned.fingerprint):
        differences.insert(0, "weights that the vector leaves alone are not as in its base")
    differences += [f"{name} is written anew" for name in shards if shards[name] != whole.get(name)]
    differences += [f"{name} is written anew" for name in sorted(written) if written[name] != files.get(name)]
    return Applied(not differences, tuple(differences))


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


class _Writer:
    """Writes shards piece by piece. total: the tensors in all of them."""

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


def _layout(vector: TaskVector, base: Checkpoint, stored: dict[str, bytes] | None) -> dict[str, Shard]:
    """The shards of the result by file name; stored: the headers that the vector gives.

    Raises HeaderError where they do not fit each other, BaseMismatchError where they do not fit the base.
    """
    headers = {shard.path.name: shard.header for shard in base.shards} if stored is None else stored
    shards = {}
    wanted = {name: info.form for name, info in base.tensors.items() if name not in vector.header.removed}
    wanted |= {name: spec.form for name, spec in vector.specs.items()}
    for file, header in headers.items():
        try:
            _, tensors = parse_header(header)
        except HeaderError as error:
            raise HeaderError(f"{vector.name}: the header of shard {file!r}: {error}") from None
        shards[file] = Shard(header, {name: info.form for name, info in tensors.items()})
        for name, info in tensors.items():
            if (found := wanted.pop(name, None)) == info.form:
                continue
            if name not in vector.specs and name not in vector.header.removed:
                # the vector leaves it alone, so the base should have it: this is another revision of the model
                raise _mismatch(vector, base, f"tensor {name!r} should be {info.form}, found {found or 'none'}")
            raise HeaderError(f"{vector.name}: shard {file!r} holds {name!r} as {info.form}, which the result does not")
    if wanted and stored is None:
        raise HeaderError(f"{vector.name}: no shard holds {min(wanted)!r}")
    if wanted:
        # a base with tensors of its own: another revision of the model
        raise BaseMismatchError(f"{base.name} has tensor {min(wanted)!r}, which the base of {vector.name} has not")
    return shards


def _side_files(vector: TaskVector, base: Checkpoint, laid_out_anew: bool) -> tuple[Files, list[str]]:
    """The side files of the result, and what in them cannot be as in the tuned checkpoint."""
    in_base = {file.name: file for file in base.side_files}
    companions = vector.source.files()
    if companions is None:
        if laid_out_anew:
            in_base.pop(INDEX, None)  # it names the base's shards
        return dict(in_base), []
    files: Files = {}
    differences = []
    for companion in companions:
        if companion.content is not None:
            files[companion.name] = companion.content
        elif companion.name not in in_base:
            differences.append(f"{companion.name} is not in the base")
        else:
            files[companion.name] = content = in_base[companion.name].read_bytes()
            if hashlib.sha256(content).hexdigest() != companion.sha256:
                differences.append(f"{companion.name} is not as in the vector's base")
    return files, differences


def _write_files(files: Files, folder: Path) -> None:
    for name, file in files.items():
        if isinstance(file, bytes):
            (folder / name).write_bytes(file)
        else:
            shutil.copyfile(file, folder / name)
