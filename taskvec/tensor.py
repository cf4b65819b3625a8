"""One tensor's arithmetic: the difference of two states, and a state from a difference. Exact to the last bit."""

from __future__ import annotations

import numpy as np

from taskvec_formats import SparseTensor
from taskvec_formats.dtypes import BitArray, DType


def diff_tensor(
    dtype: DType, shape: tuple[int, ...], base: BitArray, tuned: BitArray
) -> tuple[SparseTensor, SparseTensor]:
    """tuned − base as additive entries and the exceptions that make them exact.

    base, tuned: carriers [size] of one dtype. Returns (delta, exceptions): delta has f32 values, one entry for each
    element whose bits differ and whose difference is a finite, non-zero number; exceptions carry the tuned bits
    wherever rounding (base + delta) does not give them: a few f32 elements, NaN, ±inf, a changed sign of
    zero, and every changed element of a dtype that cannot be added.
    """
    changed = np.flatnonzero(base != tuned)
    before, after = base[changed], tuned[changed]
    if not dtype.additive:
        return SparseTensor.empty(shape), SparseTensor(shape, changed, after)
    with np.errstate(all="ignore"):  # overflow and NaN are expected: such elements become exceptions
        difference = after.view(dtype.real).astype(dtype.compute) - before.view(dtype.real).astype(dtype.compute)
        values = difference.astype(np.float32)
    is_entry = np.isfinite(values) & (values != 0)
    exact = is_entry & (add(dtype, before, values) == after)
    return (
        SparseTensor(shape, changed[is_entry], values[is_entry]),
        SparseTensor(shape, changed[~exact], after[~exact]),
    )


def add(dtype: DType, bits: BitArray, values: np.ndarray[tuple[int], np.dtype[np.float32]]) -> BitArray:
    """Round (value of `bits` + values) to `dtype`, formed in f32 (f64 for F64); carriers [n] in, carriers [n] out."""
    with np.errstate(all="ignore"):
        total = bits.view(dtype.real).astype(dtype.compute) + values.astype(dtype.compute)
        result: BitArray = total.astype(dtype.real).view(dtype.carrier)
    return result


def apply_tensor(dtype: DType, base: BitArray, delta: SparseTensor, exceptions: SparseTensor) -> BitArray:
    """base with the entries added and the exceptions set: new carriers [size]; every other element keeps its bits."""
    tuned: BitArray = base.copy()
    if len(delta):
        tuned[delta.indices] = add(dtype, base[delta.indices], delta.values)
    tuned[exceptions.indices] = exceptions.values
    return tuned


def as_bytes(bits: BitArray) -> memoryview:
    """The bytes of a contiguous array of carriers, without a copy."""
    return memoryview(bits.view(np.uint8).data)
