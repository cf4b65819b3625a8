"""Computation of a task vector or a patch from a base and a tuned checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from taskvec_formats import Change, Checkpoint, Header, Identity, Kind, SideFile, TensorSpec
from taskvec_formats.checkpoint import short
from taskvec_formats.dtypes import BitArray
from taskvec_formats.file_names import INDEX, SINGLE
from taskvec_formats.forms import Bits

from ..arguments import instance, one_of
from ..errors import DiffError, UsageError
from ..hub.base import record as base_record
from ..reporting.progress import Progress, silent
from ..reporting.throughput import hashed
from . import carried
from .delta import BaseBits, diff_range, differences, replace_range
from .layers import counted, record
from .lineage import shortened
from .source import DeltaSource, inputs_of
from .topk import FloatArray, TopK, check_sparsity, entries_for, top_k
from .vector import TaskVector

KINDS = ("vector", "patch")
LAYOUT = "layout"  # entry of the provenance
_MADE_BY = {"made_by": "pack"}


def check_kind(kind: str, sparsity: float | None) -> None:
    """Check the kind of a vector and its sparsity.

    Args:
        kind: "vector" or "patch".
        sparsity: The sparsity, or None.

    Raises:
        UsageError: The kind is unknown, the sparsity is outside (0, 1), or a sparsity is given for a patch.
    """
    one_of("`kind`", kind, KINDS)
    if sparsity is not None:
        check_sparsity(sparsity)
        if kind != "vector":
            raise UsageError("a patch keeps every change; `sparsity` needs `kind=vector`")


def check_same_model(base: Checkpoint, tuned: Checkpoint) -> None:
    """Check that two checkpoints have the same tensors with the same dtypes and shapes, as a sparsity requires.

    Args:
        base: The model before fine-tuning.
        tuned: The model after fine-tuning.

    Raises:
        DiffError: A tensor is missing or has another dtype or shape. The message names it.
    """
    needs = "`sparsity` needs the same tensors in both models"
    for name in sorted(base.tensors.keys() ^ tuned.tensors.keys()):
        owner, other = (base, tuned) if name in base.tensors else (tuned, base)
        raise DiffError(f"{needs}, but tensor {name!r} is in {owner.name} and not in {other.name}")
    for name, info in base.tensors.items():
        found = tuned.tensors[name]
        if found.form != info.form:
            raise DiffError(
                f"{needs}, but tensor {name!r} is {info.form} in {base.name} and {found.form} in {tuned.name}"
            )


def diff(
    base: Checkpoint,
    tuned: Checkpoint,
    sparsity: float | None = None,
    progress: Progress = silent,
    kind: Kind = "vector",
) -> TaskVector:
    """Return the vector or patch from base to tuned, computed block by block when it is read or saved.

    The eligible tensors are those that changed at all, because a checkpoint does not say which others were frozen.

    The provenance lists under "not_carried" what is not stored of the tuned folder: subfolders, weights in other files,
    and permissions; with a sparsity also changed side files, changed tensors that cannot be added, and the number of
    changes in a tensor that are not finite numbers, if they are left out.

    Args:
        base: The model before fine-tuning.
        tuned: The model after fine-tuning.
        sparsity: None keeps every change, so that applying the result gives `tuned` back to the last bit, including
            tensors that were added, removed, resized or retyped, shards and side files. A number s keeps the k =
            round((1 − s)·N) changes of largest magnitude, or every change if there are fewer. N is the number of
            elements of the tensors that can be added and that tuning changed. Ties go to the first position.
        progress: Called for every tensor.
        kind: "vector" for tuned − base as deltas, which can be merged; "patch" for the new bits relative to the base,
            which are smaller.

    Raises:
        UsageError: As in `check_kind`.
        DiffError: The checkpoints have no tensor in common; with a sparsity, as in `check_same_model`; or a side file
            has a name that cannot be stored.
        MaskError: The sparsity keeps no entry.
    """
    sparsity = check_pair(base, tuned, kind, sparsity)
    stored = carried.carried(tuned)
    before, after = hashed(base, "base", progress), hashed(tuned, "tuned", progress)
    specs = [spec_of(base, tuned, name, before) for name in tuned.tensors if before.get(name) != after[name]]
    source = Pair(base, tuned, {spec.name: spec for spec in specs}, kind, stored.files)
    if sparsity is None:
        header = header_of(source, [spec.name for spec in specs], stored.left_out)
        return TaskVector(header, specs, source, tuned.name, base)

    left_out = [*stored.left_out, *(f"tensor {spec.name}" for spec in specs if not spec.dtype.additive)]
    left_out += [name for name in carried.changed_files(base, tuned) if name != INDEX]
    specs = [spec for spec in specs if spec.dtype.additive]
    sparse = _Sparsified(source, specs, sparsity, progress)
    provenance = {**_MADE_BY, "tuned": shortened(tuned.name), "sparsity": sparsity}
    provenance |= record((spec.name for spec in specs), counted(base.tensors))
    provenance |= carried.record([*left_out, *sparse.left_out]) | base_record(base)
    header = Header(kind, Identity(base.name, base.fingerprint), None, tensors=(), provenance=provenance)
    return TaskVector(header, specs, sparse, tuned.name, base)


def check_pair(base: Checkpoint, tuned: Checkpoint, kind: str, sparsity: float | None = None) -> float | None:
    """Check that a vector of two checkpoints can be computed.

    Args:
        base: The model before fine-tuning.
        tuned: The model after fine-tuning.
        kind: "vector" or "patch".
        sparsity: The sparsity, or None.

    Returns:
        The sparsity as a float, or None.

    Raises:
        UsageError, DiffError, MaskError: As in `diff`.
    """
    instance("base", base, Checkpoint)
    instance("tuned", tuned, Checkpoint)
    check_kind(kind, sparsity)
    if sparsity is not None:
        sparsity = check_sparsity(sparsity)
        check_same_model(base, tuned)
    elif not base.tensors.keys() & tuned.tensors.keys():
        raise DiffError(f"{base.name} and {tuned.name} have no tensor in common: not two states of one model")
    return sparsity


def header_of(pair: Pair, changed: Sequence[str], left_out: Iterable[str]) -> Header:
    """Return the header of the vector of a pair with every change.

    Args:
        pair: The checkpoints, whose digests are known.
        changed: Names of the tensors that tuning changed or added, in order.
        left_out: What the vector does not carry of the tuned folder.
    """
    base, tuned = pair.base, pair.tuned
    provenance: dict[str, Any] = dict(_MADE_BY)
    if base.shards and pair.shards() is None:
        provenance[LAYOUT] = layout_digest(base)
    layers = counted(base.tensors) if pair.kind == "vector" else {}
    return Header(
        pair.kind,
        Identity(base.name, base.fingerprint),
        Identity(tuned.name, tuned.fingerprint),
        tensors=(),
        removed=tuple(sorted(base.tensors.keys() - tuned.tensors.keys())),
        provenance=provenance | record(changed, layers) | carried.record(left_out) | base_record(base),
    )


def layout_digest(checkpoint: Checkpoint) -> str:
    """Return 16 hex digits that identify the shards of a checkpoint: their names and headers.

    A vector whose result has the shards of its base contains none. It records this digest of the base instead, because
    another base with the same tensors may have other shards.
    """
    shards = sorted((shard.path.name, shard.header) for shard in checkpoint.shards)
    return hashlib.sha256(repr(shards).encode()).hexdigest()[:16]


def spec_of(base: Checkpoint, tuned: Checkpoint, name: str, digests: Mapping[str, str]) -> TensorSpec:
    """Return the spec of a tensor of the tuned checkpoint.

    Args:
        base: The model before fine-tuning.
        tuned: The model after fine-tuning.
        name: The tensor.
        digests: Digests of the tensors of the base, in hex. The spec has none if they lack the tensor.
    """
    form, origin = tuned.tensors[name].form, base.tensors[name].form if name in base.tensors else None
    return TensorSpec(name, form.dtype, form.shape, origin, base=short(digests[name]) if name in digests else None)


class Pair:
    """The Source of the difference of two checkpoints.

    Args:
        base: The model before fine-tuning.
        tuned: The model after fine-tuning.
        specs: Tensor name -> spec of the tensors that change.
        kind: The kind of the vector.
        side_files: The side files of the tuned folder that the vector stores.

    Attributes:
        base, tuned, specs, kind: As given.
        base_bits: Returns a tensor of the base in the form that a spec requires.
    """

    by_range = True

    def __init__(
        self, base: Checkpoint, tuned: Checkpoint, specs: dict[str, TensorSpec], kind: Kind, side_files: Sequence[Path]
    ) -> None:
        self.base = base
        self.tuned = tuned
        self.specs = specs
        self.kind = kind
        self._side_files = side_files
        self._is_folder = tuned.is_folder
        self.base_bits = BaseBits(base)
        self.inputs = inputs_of(base, tuned)

    @property
    def content(self) -> str:
        return self.tuned.fingerprint

    def change(self, name: str, start: int, stop: int, base: Bits | None = None) -> Change:
        spec = self.specs[name]
        before = (self.base_bits(spec) if base is None else base)[start:stop]
        return self.between(spec, before, self.tuned.bits(name, start, stop))

    def between(self, spec: TensorSpec, before: BitArray, after: BitArray) -> Change:
        """Return the change of a range of a tensor from its carriers, [n], in base and tuned."""
        return replace_range(before, after) if self.kind == "patch" else diff_range(spec.dtype, before, after)

    def not_finite(self, name: str, start: int, stop: int, change: Change) -> int:
        """Return the number of elements [start, stop) of a tensor whose difference is not a finite number.

        Args:
            name: The tensor.
            start: The first element.
            stop: The end of the range.
            change: The change of these elements.
        """
        alone = np.setdiff1d(change.replacements.indices, change.delta.indices, assume_unique=True)
        if not len(alone):
            return 0
        spec = self.specs[name]
        before, after = self.base_bits(spec)[start:stop], self.tuned.bits(name, start, stop)
        return int(np.count_nonzero(~np.isfinite(differences(spec.dtype, before[alone], after[alone]))))

    def shards(self) -> dict[str, bytes] | None:
        if not self.tuned.shards:  # in memory
            return None
        base = {shard.path.name: shard.header for shard in self.base.shards}
        tuned = {shard.path.name: shard.header for shard in self.tuned.shards}
        if not self._is_folder:
            # a single file may have any name, but loaders look for the name in the base or for the default name
            listed = any(file.name == INDEX for file in self.base.side_files)
            name = min(base) if len(base) == 1 and not listed else SINGLE
            tuned = {name: self.tuned.shards[0].header}
        return None if base == tuned else tuned

    def files(self) -> list[SideFile] | None:
        if not self._is_folder:
            return None
        base = {file.name: _content(file) for file in self.base.side_files}
        return [_side_file(file, base.get(file.name)) for file in self._side_files]


def _content(file: Path) -> bytes:
    """Return the content of a side file, which may be gone since the difference was taken."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise DiffError(f"{file}: {error.strerror}; the folder must not change before the vector is saved") from None


def _side_file(file: Path, in_base: bytes | None) -> SideFile:
    content = _content(file)
    return SideFile(file.name, hashlib.sha256(content).hexdigest(), None if content == in_base else content)


class _Sparsified(DeltaSource):
    """The Source of the k largest entries of another source, with the replacements at their positions.

    If there are at most k entries, all of them and all replacements are kept.

    Args:
        source: The other source.
        specs: Its tensors whose changes can be added.
        sparsity: The share of their elements without an entry.
        progress: Called for every tensor.

    Attributes:
        left_out: Descriptions of the changes that are left out because they are not finite numbers.

    Raises:
        MaskError: The sparsity keeps no entry.
    """

    def __init__(self, source: Pair, specs: list[TensorSpec], sparsity: float, progress: Progress) -> None:
        self._source = source
        self.inputs = source.inputs
        self._specs = {spec.name: spec for spec in specs}
        self._passes = 0
        self._progress = progress
        wanted = entries_for(sparsity, sum(spec.size for spec in specs))
        changes, not_finite = 0, dict.fromkeys(self._specs, 0)
        for (name, start), stop, change in self._changes():
            changes += len(change.delta)
            not_finite[name] += source.not_finite(name, start, stop, change)
        self._selection = top_k(self._deltas, wanted) if wanted < changes else None
        progress("selecting", 4 * len(specs), 4 * len(specs), "")
        counts = {} if self._selection is None else not_finite
        self.left_out = [
            f"changes of tensor {name} that are not finite numbers ({count:,})"
            for name, count in counts.items()
            if count
        ]

    @property
    def content(self) -> str:
        return self._source.content

    def _changes(self) -> Iterator[tuple[tuple[str, int], int, Change]]:
        """Yield ((tensor, first element), end, change) of every block."""
        for done, spec in enumerate(self._specs.values()):
            self._progress("selecting", self._passes * len(self._specs) + done, 4 * len(self._specs), spec.name)
            for start, stop in spec.form.blocks():
                yield (spec.name, start), stop, self._source.change(spec.name, start, stop)
        self._passes += 1

    def _deltas(self) -> Iterator[tuple[tuple[str, int], FloatArray]]:
        return ((key, change.delta.values) for key, _, change in self._changes())

    def change(self, name: str, start: int, stop: int, base: Bits | None = None) -> Change:
        if self._selection is None:
            return self._source.change(name, start, stop, base)
        # ties were counted per block, so whole blocks are selected from
        spec = self._specs[name]
        spans = spec.form.blocks_of(start, stop)
        parts = [(span[0], self._kept(self._selection, name, span, base)) for span in spans]
        return Change.joined(parts, start, stop, spec.dtype)

    def _kept(self, selection: TopK, name: str, span: tuple[int, int], base: Bits | None) -> Change:
        full = self._source.change(name, *span, base)
        delta = full.delta.take(selection.indices((name, span[0]), full.delta.values))
        return Change(delta, full.replacements.at(delta.indices))
