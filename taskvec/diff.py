"""base + tuned -> task vector."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from taskvec_formats import Base, Checkpoint, SparseTensor, TensorSpec
from taskvec_formats.checkpoint import tensor_digest

from .errors import DiffError
from .masks import FloatArray, check_sparsity, entries_for, top_k
from .progress import Progress, silent
from .tensor import apply_tensor, as_bytes, diff_tensor
from .vector import TaskVector


def check_same_model(base: Checkpoint, tuned: Checkpoint) -> None:
    """Raise DiffError, naming the tensor, unless both have the same tensors with the same dtypes and shapes."""
    for name in sorted(base.tensors.keys() ^ tuned.tensors.keys()):
        owner, other = (base, tuned) if name in base.tensors else (tuned, base)
        raise DiffError(f"tensor {name!r} is in {owner.name} but not in {other.name}: not two states of one model")
    for name, info in base.tensors.items():
        found = tuned.tensors[name]
        if (found.dtype, found.shape) != (info.dtype, info.shape):
            raise DiffError(
                f"tensor {name!r} is {info.dtype.name} {list(info.shape)} in {base.name} "
                f"but {found.dtype.name} {list(found.shape)} in {tuned.name}"
            )


def diff(base: Checkpoint, tuned: Checkpoint, sparsity: float | None = None, progress: Progress = silent) -> TaskVector:
    """The task vector tuned − base, computed tensor by tensor when it is read or saved.

    sparsity: None keeps every change, so that applying the vector gives `tuned` back to the last bit. A number s keeps
        the k = round((1 − s)·N) changes of largest magnitude, N being the elements of the tensors that can be added and
        that tuning changed at all, or every change where there are fewer; ties by position.
    Eligible are the tensors that changed at all: a checkpoint does not say which others were frozen.
    Raises DiffError where the two are not states of one model, UsageError for a sparsity outside (0, 1).
    """
    if sparsity is not None:
        check_sparsity(sparsity)
    check_same_model(base, tuned)
    before = base.digests(lambda done, total: progress("hashing base", done, total, ""))
    after = tuned.digests(lambda done, total: progress("hashing tuned", done, total, ""))
    specs = {
        name: TensorSpec(name, info.dtype, info.shape, base=before[name], tuned=after[name])
        for name, info in base.tensors.items()
        if before[name] != after[name]
    }
    source = _Pair(base, tuned)
    provenance = {"made_by": "pack", "tuned": tuned.name}
    identity = Base(base.name, base.fingerprint)
    if sparsity is None:
        return TaskVector(identity, specs.values(), source, provenance)

    specs = {name: spec for name, spec in specs.items() if spec.dtype.additive}
    sparse = _Sparsified(source, specs, sparsity, progress)
    for done, (name, spec) in enumerate(specs.items()):
        progress("digesting", done, len(specs), name)
        data = as_bytes(apply_tensor(spec.dtype, base.bits(name), sparse.delta(name), sparse.exceptions(name)))
        specs[name] = replace(spec, tuned=tensor_digest(name, spec.dtype, spec.shape, data))
    return TaskVector(identity, specs.values(), sparse, {**provenance, "sparsity": sparsity})


class _Pair:
    """Entries from two checkpoints. The last tensor is kept: delta and exceptions are asked for one after the other."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint) -> None:
        self._base = base
        self._tuned = tuned
        self._last: tuple[str, SparseTensor, SparseTensor] | None = None

    def _diff(self, name: str) -> tuple[str, SparseTensor, SparseTensor]:
        if self._last is None or self._last[0] != name:
            self._last = None  # free it before the next is made
            info = self._base.tensors[name]
            self._last = (name, *diff_tensor(info.dtype, info.shape, self._base.bits(name), self._tuned.bits(name)))
        return self._last

    def delta(self, name: str) -> SparseTensor:
        return self._diff(name)[1]

    def exceptions(self, name: str) -> SparseTensor:
        return self._diff(name)[2]


class _Sparsified:
    """The k largest entries of another source, with the exceptions at their positions."""

    def __init__(self, source: _Pair, specs: dict[str, TensorSpec], sparsity: float, progress: Progress) -> None:
        self._source = source
        self._specs = specs
        self._passes = 0
        self._progress = progress
        wanted = entries_for(sparsity, sum(spec.size for spec in specs.values()))
        changes = sum(len(delta) for _, delta in self._deltas())
        self._selection = top_k(self._deltas, wanted) if wanted < changes else None

    def _deltas(self) -> Iterator[tuple[str, FloatArray]]:
        for done, name in enumerate(self._specs):
            self._progress("selecting", self._passes * len(self._specs) + done, 4 * len(self._specs), name)
            yield name, self._source.delta(name).values
        self._passes += 1

    def delta(self, name: str) -> SparseTensor:
        full = self._source.delta(name)
        if self._selection is None:
            return full
        kept = self._selection.indices(name, full.values)
        return SparseTensor(full.shape, full.indices[kept], full.values[kept])

    def exceptions(self, name: str) -> SparseTensor:
        full = self._source.exceptions(name)
        if self._selection is None:
            return full
        kept = np.isin(full.indices, self.delta(name).indices, assume_unique=True)
        return SparseTensor(full.shape, full.indices[kept], full.values[kept])
