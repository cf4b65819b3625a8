"""Bit-exact differences of ranges of tensors, and their application."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from taskvec_formats import Change, Checkpoint, SparseTensor, TensorSpec
from taskvec_formats.dtypes import BitArray, DType
from taskvec_formats.forms import Bits, take_for
from taskvec_formats.sparse import true_positions


def diff_range(dtype: DType, base: BitArray, tuned: BitArray) -> Change:
    """Compute tuned − base as additive entries and the replacements that make them exact.

    The delta has one entry for each element whose bits differ and whose difference is a finite, non-zero number.
    Replacements store the tuned bits of the elements for which rounding (base + delta) does not give them: a few f32
    elements, NaN, ±inf, a changed sign of zero, and every changed element of a dtype that cannot be added.

    Args:
        dtype: The dtype of both ranges.
        base: Carriers [n] of the base.
        tuned: Carriers [n] of the tuned state.

    Returns:
        The change, with f32 deltas.
    """
    shape = (len(base),)
    changed = true_positions(base != tuned)
    before, after = base[changed], tuned[changed]
    if not dtype.additive:
        return Change(SparseTensor.empty(shape), SparseTensor.owning(shape, changed, after))
    values = differences(dtype, before, after)
    is_entry = np.isfinite(values) & (values != 0)
    inexact = np.flatnonzero(~is_entry | (add(dtype, before, values) != after))
    entries = slice(None) if is_entry.all() else is_entry
    return Change(
        SparseTensor.owning(shape, changed[entries], values[entries]),
        SparseTensor.owning(shape, changed[inexact], after[inexact]),
    )


def differences(dtype: DType, before: BitArray, after: BitArray) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Return after − before, rounded to f32.

    Args:
        dtype: An additive dtype.
        before: Carriers [n].
        after: Carriers [n].

    Returns:
        f32 [n]. Differences that f32 cannot represent are infinite or NaN.
    """
    with np.errstate(all="ignore"):  # overflow and NaN are expected: such elements become replacements
        found = after.view(dtype.real).astype(dtype.compute) - before.view(dtype.real).astype(dtype.compute)
        values: np.ndarray[tuple[int], np.dtype[np.float32]] = found.astype(np.float32)
    return values


def replace_range(base: BitArray, tuned: BitArray) -> Change:
    """Compute the difference as replacements alone: the tuned bits of every element whose bits differ.

    Args:
        base: Carriers [n] of the base.
        tuned: Carriers [n] of the tuned state.
    """
    shape = (len(base),)
    changed = true_positions(base != tuned)
    return Change(SparseTensor.empty(shape), SparseTensor.owning(shape, changed, tuned[changed]))


def add(dtype: DType, bits: BitArray, values: np.ndarray[tuple[int], np.dtype[np.float32]]) -> BitArray:
    """Add values to the elements of a range and round the sums to the dtype.

    Args:
        dtype: The dtype of the range.
        bits: Carriers [n].
        values: f32 [n]. The sum is computed in f32, or in f64 for F64.

    Returns:
        New carriers [n].
    """
    with np.errstate(all="ignore"):
        total = bits.view(dtype.real).astype(dtype.compute) + values.astype(dtype.compute)
        result: BitArray = total.astype(dtype.real).view(dtype.carrier)
    return result


def touched_bits(dtype: DType, base: BitArray, change: Change) -> tuple[BitArray, BitArray]:
    """Return the elements that a change touches, ordered by position.

    Args:
        dtype: The dtype of the range.
        base: Carriers of the whole range in the base.
        change: The change of the range.

    Returns:
        The carriers of the touched elements in the base, and those with the change applied.
    """
    touched, delta, replacements = change.touched(), change.delta, change.replacements
    before = base[touched]
    if len(delta) and not len(replacements):
        return before, add(dtype, before, delta.values)
    after = before.copy()
    if len(delta):
        at = slice(None) if len(delta) == len(touched) else np.searchsorted(touched, delta.indices)
        after[at] = add(dtype, before[at], delta.values)
    after[np.searchsorted(touched, replacements.indices)] = replacements.values
    return before, after


def apply_range(dtype: DType, base: BitArray, change: Change) -> BitArray:
    """Apply a change to a range.

    Args:
        dtype: The dtype of the range.
        base: Carriers [n] of the base.
        change: The change of the range.

    Returns:
        New carriers [n]. Elements that the change does not touch keep their bits.
    """
    tuned: BitArray = base.copy()
    tuned[change.touched()] = touched_bits(dtype, base, change)[1]
    return tuned


def as_bytes(bits: BitArray) -> memoryview:
    """Return the bytes of a contiguous array of carriers, without a copy."""
    return memoryview(bits.view(np.uint8).data)


class BaseBits:
    """The tensors of a base, converted to the form that the specs of a vector require (forms.take_for).

    Args:
        checkpoint: The base.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        # a converted tensor is reused for all its blocks
        self._convert = lru_cache(maxsize=1)(self._converted)

    def __call__(self, spec: TensorSpec) -> Bits:
        """Return the carriers of the whole tensor, [size]. They are read slice by slice if the form does not change."""
        if spec.origin == spec.form:
            return _Stored(self._checkpoint, spec.name)
        return self._convert(spec)

    def _converted(self, spec: TensorSpec) -> BitArray:
        if spec.origin is None:
            return np.zeros(spec.size, spec.dtype.carrier)
        return take_for(self._checkpoint.bits(spec.name), spec.origin, spec.form)


class _Stored:
    """A tensor on disk as Bits. The last slice is cached, because a block is requested more than once."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint = checkpoint
        self._name = name
        self._last: tuple[slice, BitArray] | None = None

    def __getitem__(self, span: slice) -> BitArray:
        if self._last is None or self._last[0] != span:
            self._last = span, self._checkpoint.bits(self._name, span.start, span.stop)
        return self._last[1]
