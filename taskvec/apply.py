"""base + task vector -> checkpoint: a complete model folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskvec_formats import Checkpoint, TensorSpec
from taskvec_formats.atomic import atomic_directory
from taskvec_formats.checkpoint import INDEX
from taskvec_formats.container import parse_header
from taskvec_formats.errors import HeaderError
from taskvec_formats.header import stored_digest
from taskvec_formats.parallel import ordered_map

from .application import Application, mismatch
from .arguments import instance
from .errors import BaseMismatchError, UsageError
from .output import AS_IT_IS, Files, Output, Shard
from .progress import Progress, silent
from .record import RecordedFolder
from .vector import TaskVector
from .writer import Writer


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


def check_result(vector: TaskVector, base: Checkpoint, progress: Progress = silent) -> None:
    """Apply every block in memory and compare it with its digests; the errors of `apply`, nothing written."""
    instance("vector", vector, TaskVector)
    instance("base", base, Checkpoint)
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
    for what, value, kind in (("vector", vector, TaskVector), ("base", base, Checkpoint), ("output", output, Output)):
        instance(what, value, kind)
    out = Path(out)
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
    writer = Writer(application, vector, base, output, shards, progress)
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
                raise mismatch(vector, base, f"tensor {name!r} should be {info.form}, found {found or 'none'}")
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
