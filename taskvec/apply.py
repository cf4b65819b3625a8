"""base + task vector -> checkpoint, and the proof that the base is the right one.

A vector fits every checkpoint that has the base's bits at the elements that the vector touches; so vectors whose masks
do not meet can be applied one after the other. The digest of those elements is checked before and after.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskvec_formats import Checkpoint, TensorSpec
from taskvec_formats.atomic import atomic_directory
from taskvec_formats.blocks import touched_digest
from taskvec_formats.checkpoint import INDEX, begin_digest, fingerprint, short
from taskvec_formats.container import TensorInfo, parse_header
from taskvec_formats.dtypes import BitArray
from taskvec_formats.errors import ChecksumError, HeaderError, StreamError
from taskvec_formats.header import Block
from taskvec_formats.parallel import ordered_map
from taskvec_formats.sparse import Indices

from .errors import AlreadyAppliedError, BaseMismatchError
from .progress import Progress, silent
from .tensor import BaseBits, as_bytes, touched_bits
from .vector import TaskVector


@dataclass(frozen=True)
class Applied:
    """What came of it.

    exact: whether the result is the tuned checkpoint that the vector was taken from, every tensor, shard and side file
        byte for byte; None where the vector does not know one (trained, merged or sparsified).
    differences: why it is not, one sentence each: the base differs from the vector's in something it does not touch.
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


def apply(vector: TaskVector, base: Checkpoint, out: Path, progress: Progress = silent) -> Applied:
    """Write the folder `out`: the base with the vector applied; shards and side files as in the tuned checkpoint.

    Where the vector knows no tuned checkpoint, shards and side files are the base's. Memory: a few blocks.
    `out` appears when complete; a folder that was there is replaced then.
    Raises BaseMismatchError and FormatError; nothing is left behind then.
    """
    application = Application(vector, base, progress)
    pieces = _Pieces(application, vector, base)
    stored = vector.source.shards()
    shards = _layout(vector, base, stored)
    total = sum(len(tensors) for _, tensors in shards.values())
    digests: dict[str, Any] = {}
    with atomic_directory(out) as folder:
        for shard, (header, tensors) in shards.items():
            with open(folder / shard, "wb") as file:
                file.write(header)
                for name, piece, digest in ordered_map(pieces, _jobs(vector, tensors)):
                    file.write(piece)
                    pieces.release(name)
                    if digest is not None:
                        digests[name] = digest
                        progress("applying", len(digests), total, name)
                        continue
                    if name not in digests:
                        digests[name] = begin_digest(name, tensors[name].form)
                    digests[name].update(piece)
        differences = _copy_files(vector, base, folder, laid_out_anew=stored is not None)
    progress("applying", total, total, "")
    if vector.header.tuned is None:
        return Applied(None, tuple(differences))
    if fingerprint({name: digest.hexdigest() for name, digest in digests.items()}) != vector.header.tuned.fingerprint:
        differences.insert(0, "weights that the vector leaves alone are not as in its base")
    return Applied(not differences, tuple(differences))


def _jobs(vector: TaskVector, tensors: dict[str, TensorInfo]) -> Iterator[tuple[str, int | None]]:
    """(tensor, number of block) in the order of a shard; None for a tensor that is copied whole."""
    for name in tensors:
        spec = vector.specs.get(name)
        yield from (
            ((name, number) for number in range(spec.form.block_count)) if spec and spec.size else ((name, None),)
        )


class _Pieces:
    """The bytes of a job, and their digest where they are a whole tensor."""

    def __init__(self, application: Application, vector: TaskVector, base: Checkpoint) -> None:
        self._application = application
        self._vector = vector
        self._base = base

    def __call__(self, job: tuple[str, int | None]) -> tuple[str, memoryview, Any]:
        name, number = job
        spec = self._vector.specs.get(name)
        if spec is None or number is None:
            data = memoryview(b"") if spec else self._base.bytes(name)
            form = spec.form if spec else self._base.tensors[name].form
        else:
            data, form = as_bytes(self._application.range(spec, number)), spec.form
        if spec and spec.form.block_count > 1:
            return name, data, None
        digest = begin_digest(name, form)
        digest.update(data)
        return name, data, digest

    def release(self, name: str) -> None:
        """Give back the memory of a tensor's pages."""
        if name in self._base.tensors:
            self._base.release(name)


def _layout(
    vector: TaskVector, base: Checkpoint, stored: dict[str, bytes] | None
) -> dict[str, tuple[bytes, dict[str, TensorInfo]]]:
    """File name -> header and tensors of each shard of the result; stored: the headers that the vector gives.

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
        shards[file] = (header, tensors)
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


def _copy_files(vector: TaskVector, base: Checkpoint, folder: Path, laid_out_anew: bool) -> list[str]:
    """Write the side files; return what could not be as in the tuned checkpoint."""
    in_base = {file.name: file for file in base.side_files}
    files = vector.source.files()
    if files is None:
        if laid_out_anew:
            in_base.pop(INDEX, None)  # it names the base's shards
        for file in in_base.values():
            shutil.copyfile(file, folder / file.name)
        return []
    differences = []
    for companion in files:
        if companion.content is not None:
            (folder / companion.name).write_bytes(companion.content)
        elif companion.name not in in_base:
            differences.append(f"{companion.name} is not in the base")
        else:
            content = in_base[companion.name].read_bytes()
            (folder / companion.name).write_bytes(content)
            if hashlib.sha256(content).hexdigest() != companion.sha256:
                differences.append(f"{companion.name} is not as in the vector's base")
    return differences
