"""A task vector on a checkpoint, range by range, and the proof that the checkpoint is the right one.

A vector fits every checkpoint that has the base's bits at the elements that the vector touches; so vectors whose masks
do not meet can be applied one after the other. The digest of those elements is checked before and after.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from taskvec_formats import Change, Checkpoint, TensorSpec
from taskvec_formats.blocks import touched_digest
from taskvec_formats.checkpoint import short
from taskvec_formats.dtypes import BitArray
from taskvec_formats.errors import ChecksumError, StreamError
from taskvec_formats.header import Block
from taskvec_formats.parallel import ordered_map
from taskvec_formats.sparse import Indices

from ..errors import AlreadyAppliedError, BaseMismatchError, DTypeError
from ..reporting.progress import Progress, silent
from ..vectors.delta import BaseBits, touched_bits
from ..vectors.vector import TaskVector


class Application:
    """A vector beside a base: the tuned bits of any range.

    Raises BaseMismatchError where a tensor is missing or has another dtype or shape, or other bits than expected.
    """

    def __init__(self, vector: TaskVector, base: Checkpoint, progress: Progress = silent) -> None:
        self._vector = vector
        self._base = base
        self._bits = BaseBits(base)
        check_forms(vector, base)
        self._check_whole(progress)

    def _mismatch(self, why: str) -> BaseMismatchError:
        return mismatch(self._vector, self._base, why)

    def _check_whole(self, progress: Progress) -> None:
        """Where a vector cannot vouch for the elements that it touches, as after a merge, whole tensors must agree."""
        specs = [spec for spec in self._vector.specs.values() if spec.origin and not _vouched(spec)]
        found = ordered_map(self._base.digest, (spec.name for spec in specs))
        for done, (spec, digest) in enumerate(zip(specs, found, strict=True)):
            progress("checking base", done, len(specs), spec.name)
            if spec.base is not None and short(digest) != spec.base:
                raise self._mismatch(f"tensor {spec.name!r} has other values")
        progress("checking base", len(specs), len(specs), "")
        if any(spec.base is None for spec in specs) and self._base.fingerprint != self._vector.base.fingerprint:
            raise self._mismatch("its fingerprint is another")

    def range(self, spec: TensorSpec, number: int) -> BitArray:
        """The tuned bits of block `number` of a tensor, new carriers; the errors of `touched`."""
        change, base = self._change(spec, number)
        before, after = self._checked(spec, number, change, base)
        self._check_sum(spec, change, before, after)
        tuned: BitArray = base.copy()
        tuned[change.touched()] = after
        return tuned

    def values(self, spec: TensorSpec, number: int) -> np.ndarray[Any, np.dtype[Any]]:
        """The tuned values of block `number` of an additive tensor before they are rounded to its dtype.

        f32, or f64 for F64: base + delta, or the value that replaces it. The errors of `touched`.
        """
        change, base = self._change(spec, number)
        self._checked(spec, number, change, base)
        real, compute = spec.dtype.real, spec.dtype.compute
        with np.errstate(all="ignore"):
            values = base.view(real).astype(compute)
            before = values[change.delta.indices]
            values[change.delta.indices] += change.delta.values
            if not np.isfinite(values[change.delta.indices][np.isfinite(before)]).all():
                raise _beyond(spec, "F64" if spec.dtype.name == "F64" else "F32")
            values[change.replacements.indices] = change.replacements.values.view(real).astype(compute)
        return values

    def touched(self, spec: TensorSpec, number: int) -> tuple[Indices, BitArray, BitArray]:
        """The elements that change in block `number` of a tensor: positions in it, carriers before and after.

        Raises AlreadyAppliedError where the base is the result already, ChecksumError where the result is not the one
        that the vector gives a digest for.
        """
        change, base = self._change(spec, number)
        before, after = self._checked(spec, number, change, base)
        self._check_sum(spec, change, before, after)
        return change.touched(), before, after

    def _change(self, spec: TensorSpec, number: int) -> tuple[Change, BitArray]:
        """What happens to block `number` of a tensor, and the block of the base."""
        start, stop = spec.form.block(number)
        whole = self._bits(spec)
        try:
            return self._vector.source.change(spec.name, start, stop, whole), whole[start:stop]
        except StreamError:
            self._check_origin(spec)
            raise

    def _checked(self, spec: TensorSpec, number: int, change: Change, base: BitArray) -> tuple[BitArray, BitArray]:
        before, after = touched_bits(spec.dtype, base, change)
        # a vector that is not from a file has no blocks yet: its entries come from this very base, or are checked whole
        block = spec.blocks[number] if spec.blocks else None
        if block and block.before is not None:
            self._check_touched(spec, spec.form.block(number)[0], block, before, after)
        return before, after

    def _check_sum(self, spec: TensorSpec, change: Change, before: BitArray, after: BitArray) -> None:
        """Raise DTypeError where a finite weight and its delta add up to what the tensor's dtype does not hold.

        A vector that knows its result is exact: it replaces such weights.
        """
        if self._vector.header.tuned is not None or not spec.dtype.additive:
            return
        real = spec.dtype.real
        infinite = ~np.isfinite(after.view(real))
        if infinite.any():
            beyond = change.touched()[infinite & np.isfinite(before.view(real))]
            if not np.isin(beyond, change.replacements.indices).all():
                raise _beyond(spec, spec.dtype.name)

    def _check_origin(self, spec: TensorSpec) -> None:
        """What is stored relative to a base need not decode beside another, which is no fault of the file."""
        tuned = self._vector.header.tuned
        if tuned and tuned.fingerprint == self._base.fingerprint:
            raise self._applied(spec)
        if spec.origin and spec.base is not None and short(self._base.digest(spec.name)) != spec.base:
            raise self._mismatch(f"tensor {spec.name!r} has other values")

    def _applied(self, spec: TensorSpec) -> AlreadyAppliedError:
        return AlreadyAppliedError(
            f"{self._vector.name} is applied to {self._base.name} already: tensor {spec.name!r} is the result's"
        )

    def _check_touched(self, spec: TensorSpec, start: int, block: Block, before: BitArray, after: BitArray) -> None:
        found = touched_digest(spec, start, before)
        if found not in (block.before, block.after):
            raise self._mismatch(f"tensor {spec.name!r} has other values where the vector changes it")
        if found != block.before:
            raise self._applied(spec)
        if touched_digest(spec, start, after) != block.after:
            raise ChecksumError(f"tensor {spec.name!r}: the result has not the digest that {self._vector.name} gives")


def check_forms(vector: TaskVector, base: Checkpoint) -> None:
    """Raise BaseMismatchError where a tensor that the vector changes is missing in the base, or has another form."""
    for name, spec in vector.specs.items():
        if spec.origin is None:
            continue
        if name not in base.tensors:
            raise mismatch(vector, base, f"it has no tensor {name!r}")
        if base.tensors[name].form != spec.origin:
            raise mismatch(vector, base, f"tensor {name!r} should be {spec.origin}, found {base.tensors[name].form}")


def mismatch(vector: TaskVector, base: Checkpoint, why: str) -> BaseMismatchError:
    """The error that says why a checkpoint is not the base of a vector."""
    return BaseMismatchError(f"{base.name} is not the base of {vector.name} ({vector.base.name}): {why}")


def _beyond(spec: TensorSpec, dtype: str) -> DTypeError:
    return DTypeError(f"tensor {spec.name!r}: a weight and its delta add up to a number that is beyond {dtype}")


def _vouched(spec: TensorSpec) -> bool:
    return bool(spec.blocks) and all(block is None or block.before is not None for block in spec.blocks)
