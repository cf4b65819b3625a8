"""base + task vector -> checkpoint, and the proof that the base is the right one."""

from __future__ import annotations

import shutil
from pathlib import Path

from taskvec_formats import Checkpoint
from taskvec_formats.atomic import atomic_directory
from taskvec_formats.checkpoint import tensor_digest
from taskvec_formats.errors import ChecksumError

from .errors import BaseMismatchError
from .progress import Progress, silent
from .tensor import apply_tensor, as_bytes
from .vector import TaskVector


def check_base(vector: TaskVector, base: Checkpoint, progress: Progress = silent) -> None:
    """Raise BaseMismatchError, naming the first tensor that differs, unless `base` is the vector's base.

    Names, dtypes and shapes are compared first, from the headers alone; then every byte of the base is hashed.
    """
    for name, spec in vector.specs.items():
        if name not in base.tensors:
            raise BaseMismatchError(
                f"{base.name} is not the base of this vector ({vector.base.name}): it has no tensor {name!r}"
            )
        found = base.tensors[name]
        if (found.dtype, found.shape) != (spec.dtype, spec.shape):
            raise BaseMismatchError(
                f"{base.name} is not the base of this vector ({vector.base.name}): tensor {name!r} should be "
                f"{spec.dtype.name} {list(spec.shape)}, found {found.dtype.name} {list(found.shape)}"
            )
    digests = base.digests(lambda done, total: progress("checking base", done, total, ""))
    if base.fingerprint != vector.base.fingerprint:
        differing = [name for name, spec in vector.specs.items() if spec.base not in (None, digests[name])]
        where = f"tensor {differing[0]!r} has other values" if differing else "a tensor outside the vector differs"
        raise BaseMismatchError(f"{base.name} is not the base of this vector ({vector.base.name}): {where}")


def apply(vector: TaskVector, base: Checkpoint, out: Path, progress: Progress = silent) -> None:
    """Write the folder `out`: the base with the vector applied, sharded as the base, its side files beside it.

    Memory: one tensor. Where the vector knows what must come out (TensorSpec.tuned), the result is compared with it.
    `out` appears when complete; a folder that was there is replaced then.
    Raises BaseMismatchError before anything is written, FormatError for a damaged vector.
    """
    check_base(vector, base, progress)
    done = 0
    with atomic_directory(out) as folder:
        for shard in base.shards:
            with open(folder / shard.path.name, "wb") as file:
                # same tensors, dtypes and shapes: the base's own header describes the result, metadata included
                file.write(shard.header)
                for name in shard.tensors:
                    progress("applying", done, len(base.tensors), name)
                    done += 1
                    file.write(_tuned_bytes(vector, base, name) if name in vector.specs else shard.bytes(name))
        for side_file in base.side_files:
            shutil.copyfile(side_file, folder / side_file.name)
    progress("applying", done, len(base.tensors), "")


def check_result(vector: TaskVector, base: Checkpoint, progress: Progress = silent) -> None:
    """Apply every tensor in memory and compare it with its digest; the errors of `apply`, nothing written."""
    check_base(vector, base, progress)
    for done, name in enumerate(vector.specs):
        progress("applying", done, len(vector.specs), name)
        _tuned_bytes(vector, base, name)
    progress("applying", len(vector.specs), len(vector.specs), "")


def _tuned_bytes(vector: TaskVector, base: Checkpoint, name: str) -> memoryview:
    spec = vector.specs[name]
    data = as_bytes(apply_tensor(spec.dtype, base.bits(name), vector[name], vector.exceptions(name)))
    if spec.tuned is not None and tensor_digest(name, spec.dtype, spec.shape, data) != spec.tuned:
        raise ChecksumError(f"tensor {name!r}: the result does not have the SHA-256 that the vector gives for it")
    return data
