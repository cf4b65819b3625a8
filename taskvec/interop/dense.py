"""Vectors as dense checkpoints of tuned − base, as in the weights of the first Vicuna."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from taskvec_formats import Change, Checkpoint, Header, Identity, SparseTensor
from taskvec_formats.container import SafetensorsFile
from taskvec_formats.dtypes import BitArray
from taskvec_formats.forms import Bits
from taskvec_formats.system.atomic import atomic_file

from ..applying.apply import apply
from ..applying.output import Output
from ..applying.plan import plan_of
from ..applying.verified import Application
from ..applying.writer import Writer
from ..destination import appearing
from ..errors import BaseMismatchError, ConversionError
from ..quantised import hint
from ..reporting.progress import Progress, silent
from ..vectors.source import DeltaSource, inputs_of, no_replacements
from ..vectors.vector import TaskVector
from .entries import counts_of, deltas_of, vector_from


@dataclass(frozen=True)
class DenseDelta:
    """A checkpoint of deltas that was written.

    Attributes:
        path: The folder or file.
        entries: The number of entries of the vector; every other element is zero.
        dropped: The number of replacements that deltas cannot hold: elements that base + delta does not give exactly.
    """

    path: Path
    entries: int
    dropped: int


def to_delta(
    vector: TaskVector,
    base: Checkpoint,
    path: Path,
    progress: Progress = silent,
    *,
    shard_size: int | None = None,
    force: bool = False,
) -> DenseDelta:
    """Write tuned − base as a dense checkpoint: every tensor of the base, floating-point ones in f32.

    A folder has the shards and the side files of the base, and config.json with the dtype float32.

    Args:
        vector: The vector.
        base: The checkpoint that it was taken from.
        path: The folder to write, or the file if the name ends in .safetensors. It was checked.
        progress: Called for every tensor.
        shard_size: The largest size of a shard of a folder in bytes. None keeps the shards.
        force: Whether to replace an existing output.

    Returns:
        What was written.

    Raises:
        ConversionError: The vector adds, removes or resizes a tensor.
        KindError: It is a patch.
        BaseMismatchError: The vector has another base.
        SizeError: The disk has not enough space.
    """
    names = list(deltas_of(vector))
    if vector.base.fingerprint != base.fingerprint:
        raise BaseMismatchError(f"{vector.name} was taken from {vector.base.name}, not from {base.name}{hint(base)}")
    counts, dropped = counts_of(vector, progress)
    zeros = _Zeros(base)
    header = Header("vector", Identity(zeros.name, zeros.fingerprint), None, tensors=())
    specs = [replace(vector.specs[name], base=None, blocks=()) for name in names]
    deltas = TaskVector(header, specs, _Deltas(vector), vector.name)
    most = 8 * sum(info.form.size for info in base.tensors.values()) + (1 << 30)
    if path.suffix == ".safetensors":
        plan = plan_of(deltas, zeros, Output(most, "float32"))
        plan.check_space(path, None)
        (shard,) = plan.shards.values()
        with appearing(path), atomic_file(path, replace=force) as temporary:
            plan = replace(plan, shards={temporary.name: shard})
            Writer(Application(deltas, zeros, progress), plan, progress).write(temporary.parent)
            SafetensorsFile(temporary)  # checks it
    else:
        apply(deltas, zeros, path, progress, Output(shard_size, "float32"), force=force, max_bytes=most)
    return DenseDelta(path, sum(counts[name] for name in names), dropped)


class _Zeros(Checkpoint):
    """A checkpoint like another one, whose elements are all zero."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path, self.name, self.shards = checkpoint.path, checkpoint.name, checkpoint.shards
        self.tensors, self.side_files, self.left_out = checkpoint.tensors, checkpoint.side_files, checkpoint.left_out
        self._inputs = checkpoint.inputs

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files of the other checkpoint."""
        return self._inputs

    def bits(self, name: str, start: int = 0, stop: int | None = None) -> BitArray:
        info = self.tensors[name]
        return np.zeros((info.form.size if stop is None else stop) - start, info.dtype.carrier)


class _Deltas(DeltaSource):
    """The Source of the deltas of a vector, without its replacements and side files."""

    def __init__(self, vector: TaskVector) -> None:
        self._vector = vector
        self.inputs: Sequence[Path] = vector.inputs
        self.by_range = vector.source.by_range

    def change(self, name: str, start: int, stop: int, base: Bits | None = None) -> Change:
        delta = self._vector.change(name, start, stop).delta
        return Change(delta, no_replacements(self._vector.specs[name], stop - start))


def from_delta(
    deltas: Checkpoint, base: Checkpoint, sparsity: float | None = None, progress: Progress = silent
) -> TaskVector:
    """Return the vector of a dense checkpoint of deltas.

    Its entries are the elements that are not zero. Deltas in bf16, f16 or fp8 are converted to f32 exactly, deltas in
    f64 are rounded to it. Tensors that the checkpoint lacks do not change.

    Args:
        deltas: The checkpoint of deltas.
        base: The base.
        sparsity: As in `vector_from`.
        progress: Called for every tensor.

    Raises:
        ConversionError: A tensor of the checkpoint is not in the base, or has another shape; a delta is not a finite
            number; an integer tensor is not zero; or all deltas are zero. The base is quantised, and the checkpoint
            lacks a tensor of it.
        UsageError: The sparsity is outside (0, 1).
        FormatError: The checkpoint cannot be read.
    """
    missing = min(base.tensors.keys() - deltas.tensors.keys(), default=None)
    if missing is not None and (quantised := hint(base)):  # deltas of quantised weights have their scales too
        raise ConversionError(f"{deltas.path} lacks tensor {missing!r} of {base.name}{quantised}")
    changed = {}
    for done, name in enumerate(deltas.tensors):
        progress("reading deltas", done, len(deltas.tensors), name)
        if _is_changed(deltas, name, base):
            changed[name] = base.tensors[name].form
    progress("reading deltas", len(deltas.tensors), len(deltas.tensors), "")
    return vector_from(base, changed, _NonZero(deltas, base), deltas.path, sparsity, progress)


class _NonZero(DeltaSource):
    """The Source of the elements of a checkpoint that are not zero."""

    def __init__(self, deltas: Checkpoint, base: Checkpoint) -> None:
        self._deltas = deltas
        self._forms = {name: info.form for name, info in base.tensors.items()}
        self.inputs = inputs_of(base, deltas)

    def change(self, name: str, start: int, stop: int, base: Bits | None = None) -> Change:
        values = _values(self._deltas, name, start, stop)
        positions = np.flatnonzero(values)
        delta = SparseTensor.owning((stop - start,), positions, values[positions])
        if not np.isfinite(delta.values).all():
            raise ConversionError(
                f"{self._deltas.path}: tensor {name!r} has a delta that is not a finite number of f32"
            )
        return Change(delta, SparseTensor.empty((stop - start,), self._forms[name].dtype.carrier))


def _is_changed(deltas: Checkpoint, name: str, base: Checkpoint) -> bool:
    """Check a tensor of deltas, and return whether any of them is not zero."""
    form, where = deltas.tensors[name].form, f"{deltas.path}: tensor {name!r}"
    if name not in base.tensors:
        raise ConversionError(f"{where} is not in {base.name}{hint(base)}")
    target = base.tensors[name]
    if form.shape != target.shape:
        raise ConversionError(f"{where} is {list(form.shape)}, but {list(target.shape)} in {base.name}{hint(base)}")
    if not (form.dtype.additive and target.dtype.additive):
        if any(deltas.bits(name, *span).any() for span in form.blocks()):
            raise ConversionError(f"{where} is {form} and {target.form} in {base.name}, which cannot be added")
        return False
    return any(_values(deltas, name, *span).any() for span in form.blocks())


def _values(deltas: Checkpoint, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Return the elements [start, stop) of a tensor of deltas, f32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return deltas.bits(name, start, stop).view(deltas.tensors[name].dtype.real).astype(np.float32)
