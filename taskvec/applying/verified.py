"""Application of a task vector to a checkpoint range by range, with a check that the checkpoint is the right base.

A vector fits every checkpoint that has the base's bits at the elements that the vector touches, so vectors with
disjoint masks can be applied one after the other. The digest of those elements is checked before and after.
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
from taskvec_formats.sparse import Indices
from taskvec_formats.system.parallel import ordered_map

from ..errors import AlreadyAppliedError, BaseMismatchError, DTypeError
from ..quantised import hint
from ..reporting.progress import Progress, silent
from ..vectors.delta import BaseBits, touched_bits
from ..vectors.vector import TaskVector


class Application:
    """A vector together with a base. It computes the tuned bits of any range.

    Args:
        vector: A vector or a patch.
        base: The checkpoint to apply it to.
        progress: Called for every tensor that is checked as a whole.

    Raises:
        BaseMismatchError: A tensor is missing, or has another dtype, shape or other bits than expected.
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
        """Compare whole tensors if the vector has no digests of the elements that it touches, as after a merge."""
        specs = [spec for spec in self._vector.specs.values() if spec.origin and not has_digests(spec)]
        found = ordered_map(self._base.digest, (spec.name for spec in specs))
        for done, (spec, digest) in enumerate(zip(specs, found, strict=True)):
            progress("checking base", done, len(specs), spec.name)
            if spec.base is not None and short(digest) != spec.base:
                raise self._mismatch(
                    f"tensor {spec.name!r} has other values; whole tensors are compared if a vector was not saved with "
                    "its base at hand, as after a merge"
                )
        progress("checking base", len(specs), len(specs), "")
        if any(spec.base is None for spec in specs) and self._base.fingerprint != self._vector.base.fingerprint:
            raise self._mismatch("its fingerprint is different")

    def range(self, spec: TensorSpec, number: int) -> BitArray:
        """Return the tuned bits of a block of a tensor.

        Args:
            spec: The tensor.
            number: The number of the block.

        Returns:
            New carriers.

        Raises:
            BaseMismatchError, AlreadyAppliedError, ChecksumError, DTypeError: As in `touched`.
        """
        change, base = self._change(spec, number)
        before, after = self._checked(spec, number, change, base)
        self._check_sum(spec, change, before, after)
        tuned: BitArray = base.copy()
        tuned[change.touched()] = after
        return tuned

    def values(self, spec: TensorSpec, number: int) -> np.ndarray[Any, np.dtype[Any]]:
        """Return the tuned values of a block of an additive tensor before they are rounded to its dtype.

        Args:
            spec: The tensor.
            number: The number of the block.

        Returns:
            base + delta, or the value that replaces it, in f32, or in f64 for F64.

        Raises:
            BaseMismatchError, AlreadyAppliedError, ChecksumError: As in `touched`.
            DTypeError: The sum of a finite weight and its delta is beyond the range of f32, or of f64 for F64.
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
        """Return the elements that change in a block of a tensor.

        Args:
            spec: The tensor.
            number: The number of the block.

        Returns:
            The positions in the block, the carriers before, and the carriers after.

        Raises:
            BaseMismatchError: The base has other values at these elements than the vector's base.
            AlreadyAppliedError: The base already has the tuned values.
            ChecksumError: The result does not have the digest that the vector stores.
            DTypeError: The sum of a finite weight and its delta is beyond the range of the tensor's dtype.
        """
        change, base = self._change(spec, number)
        before, after = self._checked(spec, number, change, base)
        self._check_sum(spec, change, before, after)
        return change.touched(), before, after

    def _change(self, spec: TensorSpec, number: int) -> tuple[Change, BitArray]:
        """Return the change of a block of a tensor, and the block of the base."""
        start, stop = spec.form.block(number)
        whole = self._bits(spec)
        try:
            return self._vector.source.change(spec.name, start, stop, whole), whole[start:stop]
        except StreamError:
            self._check_origin(spec)
            raise

    def _checked(self, spec: TensorSpec, number: int, change: Change, base: BitArray) -> tuple[BitArray, BitArray]:
        before, after = touched_bits(spec.dtype, base, change)
        # a vector that is not from a file has no blocks: its entries come from this base, or whole tensors were checked
        block = spec.blocks[number] if spec.blocks else None
        if block and block.before is not None:
            self._check_touched(spec, spec.form.block(number)[0], block, before, after)
        return before, after

    def _check_sum(self, spec: TensorSpec, change: Change, before: BitArray, after: BitArray) -> None:
        """Raise DTypeError if the sum of a finite weight and its delta is beyond the range of the tensor's dtype.

        A vector with a known result is exact: it replaces such weights.
        """
        if self._vector.header.tuned is not None or not spec.dtype.additive:
            return
        real = spec.dtype.real
        with np.errstate(invalid="ignore"):  # numpy warns of signalling NaNs in bf16
            infinite, finite_before = ~np.isfinite(after.view(real)), np.isfinite(before.view(real))
        if infinite.any():
            beyond = change.touched()[infinite & finite_before]
            if not np.isin(beyond, change.replacements.indices).all():
                raise _beyond(spec, spec.dtype.name)

    def _check_origin(self, spec: TensorSpec) -> None:
        """Raise the error that explains a failed decoding if the base is another one.

        Data stored relative to a base may not decode with another base, and then the file is not at fault.
        """
        tuned = self._vector.header.tuned
        if tuned and tuned.fingerprint == self._base.fingerprint:
            raise self._applied(spec)
        if spec.origin and spec.base is not None and short(self._base.digest(spec.name)) != spec.base:
            raise self._mismatch(f"tensor {spec.name!r} has other values")

    def _applied(self, spec: TensorSpec) -> AlreadyAppliedError:
        return AlreadyAppliedError(
            f"{self._vector.name} is applied to {self._base.name} already: tensor {spec.name!r} has the tuned values"
        )

    def _check_touched(self, spec: TensorSpec, start: int, block: Block, before: BitArray, after: BitArray) -> None:
        found = touched_digest(spec, start, before)
        if found not in (block.before, block.after):
            raise self._mismatch(f"tensor {spec.name!r} has other values where the vector changes it")
        if found != block.before:
            raise self._applied(spec)
        if touched_digest(spec, start, after) != block.after:
            raise ChecksumError(f"tensor {spec.name!r}: the result does not have the digest in {self._vector.name}")


def check_forms(vector: TaskVector, base: Checkpoint) -> None:
    """Check that the base has the tensors that a vector changes, in the expected forms.

    Args:
        vector: A vector or a patch.
        base: The checkpoint to apply it to.

    Raises:
        BaseMismatchError: A tensor is missing or has another form.
    """
    for name, spec in vector.specs.items():
        if spec.origin is None:
            continue
        if name not in base.tensors:
            raise mismatch(vector, base, f"it has no tensor {name!r}{hint(base)}")
        if base.tensors[name].form != spec.origin:
            found = base.tensors[name].form
            raise mismatch(vector, base, f"tensor {name!r} should be {spec.origin}, found {found}{hint(base)}")


def mismatch(vector: TaskVector, base: Checkpoint, why: str) -> BaseMismatchError:
    """Return the error that explains why a checkpoint is not the base of a vector.

    Args:
        vector: A vector or a patch.
        base: The checkpoint.
        why: The reason.
    """
    return BaseMismatchError(f"{base.name} is not the base of {vector.name} ({vector.base.name}): {why}")


def _beyond(spec: TensorSpec, dtype: str) -> DTypeError:
    return DTypeError(f"tensor {spec.name!r}: the sum of a weight and its delta is beyond the range of {dtype}")


def has_digests(spec: TensorSpec) -> bool:
    """Return whether a vector has digests of the elements of a tensor that it touches, of the base at least."""
    return bool(spec.blocks) and all(block is None or block.before is not None for block in spec.blocks)
