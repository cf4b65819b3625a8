"""Application of a task vector or patch to a base, written as a complete model folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskvec_formats import Checkpoint, TensorSpec
from taskvec_formats.system.atomic import atomic_directory
from taskvec_formats.system.parallel import ordered_map

from ..arguments import instance
from ..destination import appearing, check_apart, check_folder
from ..errors import UsageError
from ..reporting.progress import Progress, silent
from ..reporting.throughput import hashed
from ..resume import RecordedFolder
from ..vectors.source import inputs_of
from ..vectors.vector import TaskVector
from .layout import check_index
from .output import AS_IT_IS, Output
from .plan import Plan, plan_of
from .side_files import Files
from .verified import Application
from .writer import Writer

WORK = "merge"  # the kind of work in a folder of finished shards


@dataclass(frozen=True)
class Applied:
    """The outcome of applying a vector.

    Attributes:
        exact: Whether the result is the tuned checkpoint that the vector was taken from: every tensor, shard and side
            file, byte for byte. None if the vector has no tuned checkpoint (it was trained, merged or sparsified).
        differences: The reasons why the result is not exact, one sentence each: the base differs from the vector's base
            in something that the vector does not change, or the output options change the result.
        left_out: The parts of the tuned folder that the vector does not carry, or of the base's folder if the side
            files are the base's: subfolders, weights in other files, permissions.
    """

    exact: bool | None
    differences: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def check_result(vector: TaskVector, base: Checkpoint, progress: Progress = silent) -> None:
    """Apply every block in memory and compare it with its digests. Nothing is written.

    Args:
        vector: A vector or a patch.
        base: The checkpoint to apply it to.
        progress: Called for every tensor.

    Raises:
        BaseMismatchError, FormatError, SizeError, DTypeError: As in `apply`.
    """
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
    """Write the base with the vector applied as the model folder `out`.

    Shards and side files are those of the tuned checkpoint if the vector has one, otherwise those of the base. Memory:
    a few blocks. The finished folder is read again before it gets its name: the tensors that a program finds in it are
    checked and, if the vector has a tuned checkpoint, their fingerprint. If an error is raised, only finished shards in
    `work` remain.

    Args:
        vector: A vector or a patch.
        base: The checkpoint that the vector was taken from, or one with the same values wherever the vector changes it.
        out: The model folder, which appears when it is complete.
        progress: Called with the stage, tensors done, tensors in all, and a note.
        output: What to write differently: the size of shards, the dtype, the model card.
        force: Whether to replace an existing model folder of that name, once the new one is complete.
        work: A folder on the same disk that keeps finished shards if the work is interrupted. The same call continues
            with the missing shards and gives the same bytes. The folder is removed when `out` is complete, or if no
            shard was finished. Not supported for a vector with a tuned checkpoint, whose result is compared while it is
            written.
        record: With `work`, the origin of the vector, as JSON. Base and output are recorded in any case.
        resume: Whether to continue with the content of `work`. If False, it is removed after all other checks.
        max_bytes: The largest result to write, in bytes. None allows four times the base and 2^28 bytes.

    Returns:
        Whether the result is exactly the tuned checkpoint, and the reasons if it is not.

    Raises:
        OutputExistsError: `out` exists and `force` is False.
        UsageError: `out` or `work` is an input or contains one, even with `force`; `out` is not a folder that may be
            replaced; `work` is given for a vector with a tuned checkpoint; or a dtype is given for a quantised base.
        BaseMismatchError: The vector does not fit the base.
        FormatError: A file is invalid or damaged.
        SizeError: The result is too large, or does not fit on the disk.
        ResultError: The finished folder is not what was planned.
        DTypeError: A value does not fit the dtype.
        ResumeError: `work` belongs to another call, or is in use.
    """
    for what, value, kind in (("vector", vector, TaskVector), ("base", base, Checkpoint), ("output", output, Output)):
        instance(what, value, kind)
    inputs = inputs_of(vector, base)
    out = check_folder(out, force=force, inputs=inputs)
    if work is not None:
        check_apart(work, inputs)
    if work is not None and vector.header.tuned is not None:
        raise UsageError(f"the result of {vector.name} is known and compared as a whole: it cannot be resumed")
    plan = plan_of(vector, base, output)
    check_index(plan.shards, plan.files, out.name)
    plan.check_size(max_bytes)
    plan.check_space(out, work if resume else None)
    if work is not None and not base.is_identified:
        hashed(base, "base", progress)
    writer = Writer(Application(vector, base, progress), plan, progress)
    progress("applying", 0, writer.total, f"{plan.size:,} bytes")
    if work is None:
        with appearing(out), atomic_directory(out, replace=force) as folder:
            writer.write(folder)
            written = _finish(plan, folder)
    else:
        with RecordedFolder(work, WORK, {**(record or {}), **plan.record}, resume=resume) as keep:
            writer.write_missing(keep, work)
            check_folder(out, force=force, inputs=inputs)  # again, while the finished shards are still in `work`
            with appearing(out), atomic_directory(out, replace=force) as folder:
                for name in plan.shards:
                    os.rename(work / name, folder / name)
                written = _finish(plan, folder)
            keep.remove()
    progress("applying", writer.total, writer.total, "")
    differences = plan.differences(written)
    return Applied(None if vector.header.tuned is None else not differences, differences, plan.left_out)


def _finish(plan: Plan, folder: Path) -> Checkpoint:
    """Write the side files next to the shards, and check the whole folder."""
    _write_files(plan.files, folder)
    return plan.check_written(folder)


def _write_files(files: Files, folder: Path) -> None:
    for name, file in files.items():
        if isinstance(file, bytes):
            (folder / name).write_bytes(file)
        else:
            shutil.copyfile(file, folder / name)
