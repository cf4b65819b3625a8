"""Patches of weightscope as vectors: the difference of the base and the base with the patch applied."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np

from taskvec_formats import Checkpoint, Kind
from taskvec_formats.container import SafetensorsFile, TensorInfo, shard_header
from taskvec_formats.dtypes import BitArray
from taskvec_formats.file_names import SINGLE

from ..errors import BaseMismatchError, ConversionError
from ..reporting.progress import Progress, silent
from ..vectors.diff import diff
from ..vectors.promotion import promoted
from ..vectors.vector import TaskVector
from .wsp import Patch

# the largest payload: this factor times the size of the base, plus this number of bytes; a patch of every weight of
# an 8-bit model has 5 bytes for each
_GROWTH, _SLACK = 8, 1 << 28


def from_wsp(
    path: Path, base: Checkpoint, sparsity: float | None = None, kind: Kind = "vector", progress: Progress = silent
) -> TaskVector:
    """Return the vector from a base to the base with a patch of weightscope applied.

    Its result has the weights that `weightscope apply` writes, to the last bit. The provenance has the threshold of the
    patch: smaller changes are not in it.

    Args:
        path: The `.wsp` file.
        base: The model that the patch was made from.
        sparsity: As in `diff`.
        kind: As in `diff`.
        progress: Called for every tensor.

    Raises:
        ConversionError: The file is not a valid `.wsp` file, or has weights that the dtype of the base cannot hold.
        BaseMismatchError: The patch was made from another base.
        UsageError, DiffError, MaskError: As in `diff`.
    """
    size = sum(info.form.size * info.dtype.itemsize for info in base.tensors.values())
    patch = Patch(path, _GROWTH * size + _SLACK)
    vector = diff(base, _Patched(base, patch, progress), sparsity, progress, kind)
    vector.header.provenance.update(made_by="convert", source=path.name, threshold=patch.threshold)
    return vector


@dataclass(frozen=True)
class _Shard:
    """The part of a SafetensorsFile that a difference needs: the name and header of a file that was not written."""

    path: Path
    header: bytes


class _Patched(Checkpoint):
    """A base with a patch applied, computed tensor by tensor."""

    def __init__(self, base: Checkpoint, patch: Patch, progress: Progress) -> None:
        self.path, self.name = Path(), patch.path.name
        self.side_files, self.left_out = (), ()
        self._base, self._patch = base, patch
        for name in patch.removed:
            if name not in base.tensors:
                raise _mismatch(patch, base, f"it has no tensor {name!r}")
        for done, name in enumerate(patch.records):
            progress("checking base", done, len(patch.records), name)
            if patch.records[name].changed is not None:
                _check(patch, base, name)
        progress("checking base", len(patch.records), len(patch.records), "")
        tensors = {name: info for name, info in base.tensors.items() if name not in patch.removed}
        added = {name: record.form for name, record in patch.records.items() if record.changed is None}
        tensors |= {name: TensorInfo.computed(form) for name, form in added.items()}
        self.tensors = dict(sorted(tensors.items()))
        forms = {name: info.form for name, info in self.tensors.items()}
        # `weightscope apply` writes a single file; if the tensors are those of the base, its shards are as good
        as_base = forms == {name: info.form for name, info in base.tensors.items()}
        shards = () if as_base else (_Shard(Path(SINGLE), shard_header(forms, {"format": "pt"})),)
        self.shards = cast("Sequence[SafetensorsFile]", shards)
        self._changed = lru_cache(maxsize=1)(self._computed)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files of the base, and the patch."""
        return (*self._base.inputs, self._patch.path)

    def bits(self, name: str, start: int = 0, stop: int | None = None) -> BitArray:
        """Return the elements [start, stop) of a tensor as a flat array of carriers."""
        record = self._patch.records.get(name)
        if record is None:
            return self._base.bits(name, start, stop)
        stop = record.form.size if stop is None else stop
        if record.changed is None:
            return self._patch.whole(record, start, stop)
        positions, values = self._changed(name)
        low, high = np.searchsorted(positions, (start, stop))
        bits = self._base.bits(name, start, stop).copy()
        bits[positions[low:high] - start] = values[low:high]
        return bits

    def _computed(self, name: str) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], BitArray]:
        """Return the positions of a tensor, and the new weights in the dtype of the base."""
        positions, values = self._patch.changes(name)
        own, stored = self._base.tensors[name].dtype, self._patch.records[name].form.dtype
        if own != stored:
            values = values.view(stored.real).astype(own.real).view(own.carrier)
        return positions, values


def _check(patch: Patch, base: Checkpoint, name: str) -> None:
    """Check that a tensor of the base is the one that the patch changes."""
    record = patch.records[name]
    if name not in base.tensors:
        raise _mismatch(patch, base, f"it has no tensor {name!r}")
    form = base.tensors[name].form
    if form.shape != record.form.shape:
        raise _mismatch(patch, base, f"tensor {name!r} is {form}, not {record.form}")
    if promoted(form.dtype, record.form.dtype) != form.dtype:
        raise ConversionError(
            f"{patch.path} has weights of {record.form.dtype.name} for tensor {name!r}, which is {form.dtype.name} in "
            f"{base.name} and cannot represent them"
        )
    digest = hashlib.sha256()
    for start, stop in form.blocks():
        digest.update(base.bits(name, start, stop).view(np.uint8).data)
    if digest.hexdigest() != record.digest:
        raise _mismatch(patch, base, f"tensor {name!r} has other values")


def _mismatch(patch: Patch, base: Checkpoint, why: str) -> BaseMismatchError:
    return BaseMismatchError(f"{base.name} is not the base of {patch.path}: {why}")
