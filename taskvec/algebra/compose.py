"""Composition of two task vectors, A → B and B → C, into one vector A → C."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from taskvec_formats import Change, Checkpoint, Header, Kind, SideFile, SparseTensor, TensorSpec
from taskvec_formats.dtypes import BitArray, DType
from taskvec_formats.file_names import INDEX
from taskvec_formats.forms import Bits
from taskvec_formats.sparse import Indices
from taskvec_formats.system.parallel import threads

from ..applying.overlay import Patched
from ..arguments import instance
from ..errors import BaseMismatchError, MergeError, UsageError
from ..hub.base import record as base_record
from ..reporting.progress import Progress, silent
from ..vectors.align import merging
from ..vectors.delta import add
from ..vectors.diff import diff
from ..vectors.layers import counted, most, record, recorded
from ..vectors.lineage import joined, lineage
from ..vectors.positions import common, union
from ..vectors.source import WholeTensors, inputs_of
from ..vectors.vector import TaskVector


def compose(
    first: TaskVector, second: TaskVector, base: Checkpoint | None = None, progress: Progress = silent
) -> TaskVector:
    """Compose `first`, A → B, and `second`, B → C, into one lazy vector A → C, including shards and side files.

    With the base the result is exact, whatever the vectors change, and it is a patch if both are patches.

    Without the base both must be vectors, and B must be known: `first` has a tuned checkpoint, or was composed in this
    process of vectors that lead to one. An element that only one of them changes is exact. An element that both change
    becomes A + (Δ₁ + Δ₂), the sum in f32, which is omitted if it is zero; this is C up to rounding. If either vector
    replaces an element, its bits in C are known and stored as a replacement. The result has C as its tuned checkpoint
    if all of it is exact. In any case it leads to C, and can be composed with vectors that start from C.

    Args:
        first: The vector A → B.
        second: The vector B → C.
        base: A, if available. It is read once for the fingerprint of C; tensors that change are read again on demand,
            one at a time.
        progress: Called for every tensor.

    Returns:
        The vector A → C.

    Raises:
        BaseMismatchError: `second` does not start from the checkpoint that `first` leads to.
        UsageError: This, or the result for a tensor, cannot be determined without the base.
        MergeError: A sum is outside the range of f32.
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
    """Compose with the base."""
    kind: Kind = "patch" if first.kind == second.kind == "patch" else "vector"
    whole = diff(base, Patched(_Between(base, first), second), progress=progress, kind=kind)
    header = replace(
        whole.header, provenance=provenance | base_record(base) | record(whole.specs, counted(base.tensors))
    )
    return TaskVector(header, whole.specs.values(), _Difference(first, second, whole), name, base, (first, second))


def _check_consecutive(first: TaskVector, second: TaskVector) -> None:
    """Check without the base that `second` starts from the checkpoint that `first` leads to."""
    for vector in (first, second):
        if vector.kind == "patch":
            raise UsageError(f"{vector.name} is a patch, which can only be read with its base: give the base (`base`)")
    start, end = second.base, first.leads_to
    if end is None:
        raise UsageError(
            f"{first.name} does not record the checkpoint that it leads to, so {second.name} may start from another "
            "one: give the base (`base`)"
            + (", or compose the vectors that it was made of" if first.provenance.get("made_by") == "compose" else "")
        )
    if start.fingerprint != end.fingerprint:
        raise BaseMismatchError(
            f"{second.name} starts from {start.name} ({start.fingerprint[:12]}), but {first.name} leads to "
            f"{end.name} ({end.fingerprint[:12]})"
        )


def _specs(first: TaskVector, second: TaskVector) -> dict[str, TensorSpec]:
    """Return the tensors of the result, by name."""
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
            f"tensor {name!r} should be {after.origin or 'absent'} in the base of {second.name}, but it is "
            f"{before.form} after {first.name}"
        )
    if after.form != before.form:
        raise UsageError(
            f"tensor {name!r} is changed by {first.name} and then made {after.form} by {second.name}: "
            "give the base (`base`)"
        )
    # the digests of either vector do not cover the elements that both together touch
    return replace(before, eligible=before.eligible or after.eligible, blocks=())


class _Layout:
    """The shards and side files of C, from those of both vectors."""

    content = None  # the provenance names both vectors

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
        # a file that second takes from B may be stored in first; the digest identifies it
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
        """Return whether no element is a sum of two deltas. Reads the tensors that both vectors change."""
        shared = (
            spec for name, spec in self._specs.items() if name in self._first.specs and name in self._second.specs
        )
        return all(self._is_exact(spec, *span) for spec in shared for span in spec.form.blocks())

    def _is_exact(self, spec: TensorSpec, start: int, stop: int) -> bool:
        before, after = (vector.change(spec.name, start, stop) for vector in (self._first, self._second))
        summed = before.delta.indices[common(before.delta.indices, after.delta.indices)[0]]
        return bool(np.isin(summed, _replacements(spec.dtype, before, after).indices).all())


def _replacements(dtype: DType, first: Change, second: Change) -> SparseTensor:
    """Return the elements whose bits in C are known: replacements of B plus second's deltas, and replacements of C."""
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
    """Return the sum of two deltas.

    Raises:
        MergeError: A sum is not a finite f32 number, unless the element is in `replaced`.
    """
    indices, places = union([first.indices, second.indices], first.size)
    values = np.full(
        len(indices), -0.0, np.float32
    )  # −0 + x keeps the sign of a zero x, which matters to a zero weight
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
    """B. It caches the last tensors, one per thread, because second reads a tensor once per block."""

    def __init__(self, base: Checkpoint, first: TaskVector) -> None:
        super().__init__(base, first)
        self._kept = lru_cache(maxsize=threads())(super().bits)

    def bits(self, name: str, start: int = 0, stop: int | None = None) -> BitArray:
        """Return the elements [start, stop) of a tensor as a flat array of carriers."""
        return self._kept(name)[start:stop]


class _Difference(_Layout):
    """The Source of a composition with the base: C − A, computed one whole tensor at a time, as B and C are."""

    by_range = False

    def __init__(self, first: TaskVector, second: TaskVector, difference: TaskVector) -> None:
        super().__init__(first, second)
        self.inputs = difference.inputs  # those of both vectors and of the base
        self._whole = WholeTensors(lambda name: difference.source.change(name, 0, difference.specs[name].size))

    def change(self, name: str, start: int, stop: int, base: Bits | None = None) -> Change:
        return self._whole.change(name, start, stop)
