"""One vector after another: A → B and B → C as one vector, A → C."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np

from taskvec_formats import Change, Checkpoint, Header, SideFile, SparseTensor, TensorSpec
from taskvec_formats.dtypes import BitArray, DType
from taskvec_formats.file_names import INDEX
from taskvec_formats.forms import Bits
from taskvec_formats.parallel import threads
from taskvec_formats.sparse import Indices

from ..applying.overlay import Patched
from ..arguments import instance
from ..errors import BaseMismatchError, MergeError, UsageError
from ..reporting.progress import Progress, silent
from ..vectors.align import merging
from ..vectors.delta import add
from ..vectors.diff import diff
from ..vectors.layers import counted, most, record, recorded
from ..vectors.lineage import joined, lineage
from ..vectors.positions import common, union
from ..vectors.source import inputs_of
from ..vectors.vector import TaskVector


def compose(
    first: TaskVector, second: TaskVector, base: Checkpoint | None = None, progress: Progress = silent
) -> TaskVector:
    """first, A → B, and then second, B → C, as one lazy vector A → C: tensors, shards and side files.

    base: A. With it the result is exact, whatever the vectors do; it is a patch where both are. It is read once now,
        for the fingerprint of C, and the tensors that change again when they are asked for, one at a time.
    Without it both must be vectors, and first must know B, or be composed here of vectors that lead there. An element
    that one of them changes comes out exactly, one that both change as A + (Δ₁ + Δ₂), the sum in f32, left out where it
    is zero: C but for roundings. Where first replaces an element or second does, C's bits are known and replace it. The
    result knows C where all of it is exact; in any case it leads there, and can be composed with what starts from C.

    Raises BaseMismatchError where second does not start where first leads to; UsageError where this, or what becomes of
    a tensor, cannot be told without the base; MergeError where a sum leaves the range of f32.
    """
    instance("first", first, TaskVector)
    instance("second", second, TaskVector)
    if base is not None:
        instance("base", base, Checkpoint)
    provenance: dict[str, Any] = {"made_by": "compose", **lineage((first, second))}
    name = joined((first.name, second.name), " >> ")
    if base is not None:
        return _on(base, first, second, name, provenance, progress)
    _check_consecutive(first, second)
    specs = _specs(first, second)
    layers = most([counted(first.specs), recorded(first.provenance), recorded(second.provenance)])
    provenance |= record(specs, layers)
    source = _Chain(first, second, specs)
    added = {name for name, spec in first.specs.items() if spec.origin is None}
    header = Header(
        "vector",
        first.base,
        second.header.tuned if first.header.tuned and second.header.tuned and source.is_exact() else None,
        tensors=(),
        removed=tuple(sorted({*first.header.removed, *second.header.removed} - added)),
        provenance=provenance,
    )
    composed = TaskVector(header, specs.values(), source, name, made_of=(first, second))
    composed.leads_to = second.leads_to
    return composed


def _on(
    base: Checkpoint, first: TaskVector, second: TaskVector, name: str, provenance: dict[str, Any], progress: Progress
) -> TaskVector:
    kind = "patch" if first.kind == second.kind == "patch" else "vector"
    whole = diff(base, Patched(_Between(base, first), second), progress=progress, kind=kind)
    header = replace(whole.header, provenance=provenance | record(whole.specs, counted(base.tensors)))
    return TaskVector(header, whole.specs.values(), _Difference(first, second, whole), name, base, (first, second))


def _check_consecutive(first: TaskVector, second: TaskVector) -> None:
    for vector in (first, second):
        if vector.kind == "patch":
            raise UsageError(
                f"{vector.name} is a patch, which can be read beside its base only: give the base (`base`)"
            )
    start, end = second.base, first.leads_to
    if end is None:
        raise UsageError(
            f"{first.name} does not know the checkpoint that it leads to, so that {second.name} might start elsewhere: "
            "give the base (`base`)"
            + (", or compose the vectors that it was made of" if first.provenance.get("made_by") == "compose" else "")
        )
    if start.fingerprint != end.fingerprint:
        raise BaseMismatchError(
            f"{second.name} starts from {start.name} ({start.fingerprint[:12]}), but {first.name} leads to "
            f"{end.name} ({end.fingerprint[:12]})"
        )


def _specs(first: TaskVector, second: TaskVector) -> dict[str, TensorSpec]:
    """The tensors of the result, by name."""
    specs = {name: spec for name, spec in first.specs.items() if name not in second.header.removed}
    for name, spec in second.specs.items():
        if name in first.header.removed:
            raise UsageError(
                f"tensor {name!r} is removed by {first.name} and added by {second.name}: give the base (`base`)"
            )
        specs[name] = _spec(first, second, name) if name in first.specs else spec
    return specs


def _spec(first: TaskVector, second: TaskVector, name: str) -> TensorSpec:
    before, after = first.specs[name], second.specs[name]
    if after.origin != before.form:
        raise BaseMismatchError(
            f"tensor {name!r} should be {after.origin or 'absent'} where {second.name} starts, but {first.name} "
            f"makes it {before.form}"
        )
    if after.form != before.form:
        raise UsageError(
            f"tensor {name!r} is changed by {first.name} and then made {after.form} by {second.name}: "
            "give the base (`base`)"
        )
    # neither vouches for the elements that both together touch
    return replace(before, eligible=before.eligible or after.eligible, blocks=())


class _Layout:
    """Shards and side files of C, from what both say of theirs."""

    def __init__(self, first: TaskVector, second: TaskVector) -> None:
        self._first = first
        self._second = second
        self.inputs = inputs_of(first, second)

    def shards(self) -> dict[str, bytes] | None:
        shards = self._second.source.shards()
        return self._first.source.shards() if shards is None else shards

    def files(self) -> list[SideFile] | None:
        given, files = self._first.source.files(), self._second.source.files()
        if files is None:
            laid_out_anew = self._second.source.shards() is not None
            return given and [file for file in given if file.name != INDEX or not laid_out_anew]
        # what second finds in B may have come there by first; another file of that name is not what second means
        known = {(file.name, file.sha256): file for file in given or ()}
        return [known.get((file.name, file.sha256), file) if file.content is None else file for file in files]


class _Chain(_Layout):
    """The Source of a composition without the base."""

    by_range = True

    def __init__(self, first: TaskVector, second: TaskVector, specs: dict[str, TensorSpec]) -> None:
        super().__init__(first, second)
        self._specs = specs

    def change(self, name: str, start: int, stop: int, base: Bits | None = None) -> Change:
        parts = [vector.change(name, start, stop) for vector in (self._first, self._second) if name in vector.specs]
        if len(parts) == 1:
            return parts[0]
        replacements = _replacements(self._specs[name].dtype, *parts)
        with merging(name):
            return Change(_sum(parts[0].delta, parts[1].delta, replacements.indices), replacements)

    def is_exact(self) -> bool:
        """Whether no element is a sum of two deltas; the blocks of the tensors that both change are read for it."""
        shared = (
            spec for name, spec in self._specs.items() if name in self._first.specs and name in self._second.specs
        )
        return all(self._is_exact(spec, *span) for spec in shared for span in spec.form.blocks())

    def _is_exact(self, spec: TensorSpec, start: int, stop: int) -> bool:
        before, after = (vector.change(spec.name, start, stop) for vector in (self._first, self._second))
        summed = before.delta.indices[common(before.delta.indices, after.delta.indices)[0]]
        return bool(np.isin(summed, _replacements(spec.dtype, before, after).indices).all())


def _replacements(dtype: DType, first: Change, second: Change) -> SparseTensor:
    """The elements whose bits are known after both: those of B moved on by second's deltas, and those of C."""
    before, after = first.replacements, second.replacements
    moved = before.values.copy()
    at, by = common(before.indices, second.delta.indices)
    if len(at):
        moved[at] = add(dtype, moved[at], second.delta.values[by])
    indices, (in_before, in_after) = union([before.indices, after.indices], before.size)
    values = np.empty(len(indices), dtype.carrier)
    values[in_before] = moved
    values[in_after] = after.values
    return SparseTensor.owning(before.shape, indices, values)


def _sum(first: SparseTensor, second: SparseTensor, replaced: Indices) -> SparseTensor:
    """The deltas of both. Raises MergeError for a sum that is no f32 number, unless its element is replaced."""
    indices, places = union([first.indices, second.indices], first.size)
    values = np.full(len(indices), -0.0, np.float32)  # zeros keep their sign, which decides over that of a weight
    for own, delta in zip(places, (first, second), strict=True):
        values[own] += delta.values
    both = places[0][common(first.indices, second.indices)[0]]
    too_large = both[~np.isfinite(values[both])]
    if not np.isin(indices[too_large], replaced).all():
        raise MergeError("the sum of two deltas leaves the range of f32: give the base (`base`)")
    kept = np.ones(len(indices), bool)
    kept[both] = values[both] != 0
    kept[too_large] = False
    return SparseTensor.owning(first.shape, indices[kept], values[kept])


class _Between(Patched):
    """B. It keeps the last tensors, one a thread: second asks for a tensor once a block."""

    def __init__(self, base: Checkpoint, first: TaskVector) -> None:
        super().__init__(base, first)
        self._kept = lru_cache(maxsize=threads())(super().bits)

    def bits(self, name: str, start: int = 0, stop: int | None = None) -> BitArray:
        """The elements [start, stop) of a tensor as a flat array of carriers."""
        return self._kept(name)[start:stop]


class _Difference(_Layout):
    """The Source of a composition with the base: C − A, a whole tensor at a time, as B and C are computed."""

    by_range = False

    def __init__(self, first: TaskVector, second: TaskVector, difference: TaskVector) -> None:
        super().__init__(first, second)
        self.inputs = difference.inputs  # those of both and of the base
        self._difference = difference
        self._lock = Lock()
        self._whole = lru_cache(maxsize=1)(self._changed)

    def _changed(self, name: str) -> Change:
        return self._difference.source.change(name, 0, self._difference.specs[name].size)

    def change(self, name: str, start: int, stop: int, base: Bits | None = None) -> Change:
        with self._lock:
            whole = self._whole(name)
        return Change(whole.delta.slice_range(start, stop), whole.replacements.slice_range(start, stop))
