"""base + task vector -> checkpoint: a complete model folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskvec_formats import Checkpoint, TensorSpec
from taskvec_formats.atomic import atomic_directory
from taskvec_formats.errors import FormatError
from taskvec_formats.header import stored_digest
from taskvec_formats.parallel import ordered_map

from ..arguments import instance
from ..destination import appearing, check_apart, check_folder
from ..errors import ResultError, SizeError, UsageError
from ..progress import Progress, silent
from ..resume import RecordedFolder
from ..vectors import carried
from ..vectors.source import inputs_of
from ..vectors.vector import TaskVector
from .layout import check_index, layout_of
from .output import AS_IT_IS, Files, Output, Shard
from .verified import Application
from .writer import Writer

WORK = "merge"  # what a folder of finished shards is of
# a result may be so many times as large as the base, and so much larger, without being asked for
_GROWTH, _SLACK = 4, 1 << 28


@dataclass(frozen=True)
class Applied:
    """What came of it.

    exact: whether the result is the tuned checkpoint that the vector was taken from, every tensor, shard and side file
        byte for byte; None where the vector does not know one (trained, merged or sparsified).
    differences: why it is not, one sentence each: the base differs from the vector's in something it does not touch, or
        something was to be written otherwise.
    left_out: what of the tuned folder the vector does not carry, or of the base's folder, where the side files are the
        base's: subfolders, weights in other files, permissions.
    """

    exact: bool | None
    differences: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def check_result(vector: TaskVector, base: Checkpoint, progress: Progress = silent) -> None:
    """Apply every block in memory and compare it with its digests; the errors of `apply`, nothing written."""
    instance("vector", vector, TaskVector)
    instance("base", base, Checkpoint)
    layout = layout_of(vector, base)
    _check_size(vector, base, _size(layout.shards, layout.files, AS_IT_IS), None)
    application = Application(vector, base, progress)

    def check(spec: TensorSpec) -> None:
        for number in range(spec.form.block_count):
            application.touched(spec, number)

    for done, _ in enumerate(ordered_map(check, vector.specs.values()), 1):
        progress("applying", done, len(vector.specs), "")


def apply(
    vector: TaskVector,
    base: Checkpoint,
    out: str | Path,
    progress: Progress = silent,
    output: Output = AS_IT_IS,
    *,
    force: bool = False,
    work: Path | None = None,
    record: Mapping[str, Any] | None = None,
    resume: bool = True,
    max_bytes: int | None = None,
) -> Applied:
    """Write the folder `out`: the base with the vector applied; shards and side files as in the tuned checkpoint.

    Where the vector knows no tuned checkpoint, shards and side files are the base's. Memory: a few blocks.
    The finished folder is read again before it gets its name: the tensors that a program finds in it and, where the
    vector knows the tuned checkpoint, their fingerprint.

    Args:
        vector: A vector or a patch.
        base: The checkpoint that it was taken from, or one that agrees with it where the vector changes it.
        out: The model folder, which appears when it is complete.
        progress: Called with the stage, tensors done, tensors in all, and a note.
        output: What to write otherwise: the size of shards, the dtype, the card.
        force: Whether a model folder of that name is replaced, once the new one is complete.
        work: A folder on the same disk, where finished shards wait for the others after an interruption; the same call
            goes on with those that are missing, to the same bytes. It is gone when `out` is there, or when nothing was
            finished. Not for a vector that knows a tuned checkpoint, which is compared as it is written.
        record: With `work`, what the vector comes from, as JSON; base and output are recorded in any case.
        resume: Whether to go on with what is in `work`; if not, it is removed once all else was checked.
        max_bytes: The largest result that is written. None allows four times the base and 2^28 bytes.

    Raises:
        OutputExistsError: `out` exists and `force` is not given.
        UsageError: `out` or `work` is or holds something that is read here, whatever `force` is; `out` is not a folder
            that may be replaced; `work` beside a vector that knows its result; a quantised base that is to have another
            dtype.
        BaseMismatchError: The vector does not fit the base.
        FormatError: A file is not what it should be.
        SizeError: The result is too large, or does not fit on the disk.
        ResultError: The finished folder is not what was to be written.
        DTypeError: A value does not fit the dtype.
        ResumeError: `work` is that of another call, or in use.

    In any of these cases nothing is left behind but finished shards in `work`.
    """
    for what, value, kind in (("vector", vector, TaskVector), ("base", base, Checkpoint), ("output", output, Output)):
        instance(what, value, kind)
    inputs = inputs_of(vector, base)
    out = check_folder(out, force=force, inputs=inputs)
    if work is not None:
        check_apart(work, inputs)
    if work is not None and vector.header.tuned is not None:
        raise UsageError(f"{vector.name} knows the checkpoint that it gives: it is written at one go, not resumed")
    layout = layout_of(vector, base)
    left_out = tuple(base.left_out) if layout.keeps_files else carried.recorded(vector.provenance)
    written = output.files(layout.files, base.name)
    shards = output.shards(layout.shards)
    written |= output.index(written, shards, lacking=layout.lacks_index)
    check_index(shards, written, out.name)
    size = _size(shards, written, output)
    _check_size(vector, base, size, max_bytes)
    _check_space(out, size, work if resume else None)
    if work is not None:
        base.digests(lambda done, total: progress("hashing base", done, total, ""))
    application = Application(vector, base, progress)
    writer = Writer(application, vector, base, output, shards, progress)
    progress("applying", 0, writer.total, f"{size:,} bytes")
    if work is None:
        with appearing(out), atomic_directory(out, replace=force) as folder:
            writer.write(folder)
            _write_files(written, folder)
            found = _finished(folder, shards, written, output)
    else:
        headers = {name: stored_digest(shard.header) for name, shard in shards.items()}
        settings = {"dtype": output.dtype, "shard_size": output.shard_size, "shards": headers}
        recorded = {**(record or {}), "base": base.fingerprint, "output": settings}
        with RecordedFolder(work, WORK, recorded, resume=resume) as keep:
            writer.write_missing(keep, work)
            check_folder(out, force=force, inputs=inputs)  # again, as long as the shards can wait
            with appearing(out), atomic_directory(out, replace=force) as folder:
                _write_files(written, folder)
                for name in shards:
                    os.rename(work / name, folder / name)
                found = _finished(folder, shards, written, output)
            keep.remove()
    progress("applying", writer.total, writer.total, "")
    differences = list(layout.differences)
    if vector.header.tuned is None:
        return Applied(None, tuple(differences), left_out)
    as_it_is = all(output.form(form) == form for shard in shards.values() for form in shard.tensors.values())
    # tensors of another dtype are not the tuned checkpoint's in any case, and are named below
    if as_it_is and found.fingerprint != vector.header.tuned.fingerprint:
        differences.insert(0, "weights that the vector leaves alone are not as in its base")
    differences += [f"{name} is written anew" for name in shards if shards[name] != layout.shards.get(name)]
    differences += [f"{name} is written anew" for name in sorted(written) if written[name] != layout.files.get(name)]
    return Applied(not differences, tuple(differences), left_out)


def _size(shards: Mapping[str, Shard], files: Files, output: Output) -> int:
    """Bytes of all files of a result."""
    beside = (len(file) if isinstance(file, bytes) else file.stat().st_size for file in files.values())
    return sum(map(output.length, shards.values())) + sum(beside)


def _check_size(vector: TaskVector, base: Checkpoint, size: int, most: int | None) -> None:
    """Raise SizeError where the result is larger than `most` bytes or, without that, out of proportion to the base.

    A tensor that a vector adds is zeros where the vector gives no value, so a small file can describe a huge model.
    """
    held = sum(shard.path.stat().st_size for shard in base.shards)
    limit = _GROWTH * held + _SLACK if most is None else most
    if size > limit:
        raise SizeError(
            f"{vector.name} makes a model of {size:,} bytes of {base.name}, which has {held:,}; at most {limit:,} are "
            "written unless a larger size is allowed"
        )


def _check_space(out: Path, size: int, work: Path | None) -> None:
    """Raise SizeError where the disk of the output cannot hold so many bytes; what is in `work` is there already."""
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if work is not None and work.is_dir():
        free += sum(file.stat().st_size for file in work.iterdir())
    if size > free:
        raise SizeError(f"{out} takes {size:,} bytes, and {free:,} are free in {folder}")


def _finished(folder: Path, shards: Mapping[str, Shard], files: Files, output: Output) -> Checkpoint:
    """The checkpoint that a program finds in a folder that was just written.

    Raises ResultError where that is not what was to be written.
    """
    expected = {name: output.form(form) for shard in shards.values() for name, form in shard.tensors.items()}
    try:
        found = Checkpoint(folder)
    except FormatError as error:
        raise ResultError(f"the model that was written cannot be read: {error}") from None
    if {file.name for file in folder.iterdir()} != shards.keys() | files.keys():
        raise ResultError("the model that was written lacks a file: two of its names may be one on this file system")
    for name, form in expected.items():
        info = found.tensors.get(name)
        if info is None or info.form != form:
            raise ResultError(f"the model that was written has tensor {name!r} as {info and info.form}, not as {form}")
    if more := sorted(found.tensors.keys() - expected.keys()):
        raise ResultError(f"the model that was written has tensor {more[0]!r}, which the result does not")
    return found


def _write_files(files: Files, folder: Path) -> None:
    for name, file in files.items():
        if isinstance(file, bytes):
            (folder / name).write_bytes(file)
        else:
            shutil.copyfile(file, folder / name)
