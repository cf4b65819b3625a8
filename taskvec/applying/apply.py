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
from taskvec_formats.parallel import ordered_map

from ..arguments import instance
from ..destination import appearing, check_apart, check_folder
from ..errors import UsageError
from ..reporting.progress import Progress, silent
from ..resume import RecordedFolder
from ..vectors.source import inputs_of
from ..vectors.vector import TaskVector
from .layout import check_index
from .output import AS_IT_IS, Files, Output
from .plan import Plan, plan_of
from .verified import Application
from .writer import Writer

WORK = "merge"  # what a folder of finished shards is of


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
    plan_of(vector, base, AS_IT_IS).check_size(None)
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
    plan = plan_of(vector, base, output)
    check_index(plan.shards, plan.files, out.name)
    plan.check_size(max_bytes)
    plan.check_space(out, work if resume else None)
    if work is not None:
        base.digests(lambda done, total: progress("hashing base", done, total, ""))
    writer = Writer(Application(vector, base, progress), plan, progress)
    progress("applying", 0, writer.total, f"{plan.size:,} bytes")
    if work is None:
        with appearing(out), atomic_directory(out, replace=force) as folder:
            writer.write(folder)
            written = _finish(plan, folder)
    else:
        with RecordedFolder(work, WORK, {**(record or {}), **plan.record}, resume=resume) as keep:
            writer.write_missing(keep, work)
            check_folder(out, force=force, inputs=inputs)  # again, as long as the shards can wait
            with appearing(out), atomic_directory(out, replace=force) as folder:
                for name in plan.shards:
                    os.rename(work / name, folder / name)
                written = _finish(plan, folder)
            keep.remove()
    progress("applying", writer.total, writer.total, "")
    differences = plan.differences(written)
    return Applied(None if vector.header.tuned is None else not differences, differences, plan.left_out)


def _finish(plan: Plan, folder: Path) -> Checkpoint:
    """Write the side files beside the shards, and check the whole."""
    _write_files(plan.files, folder)
    return plan.check_written(folder)


def _write_files(files: Files, folder: Path) -> None:
    for name, file in files.items():
        if isinstance(file, bytes):
            (folder / name).write_bytes(file)
        else:
            shutil.copyfile(file, folder / name)
