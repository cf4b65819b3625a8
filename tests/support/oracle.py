"""Naive implementations to compare with, by dense loops and full sorts, and Hypothesis strategies for their inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from taskvec_formats import SparseTensor
from taskvec_formats.dtypes import BitArray, DType

Strategy = st.SearchStrategy[Any]
F32_VALUES = nps.from_dtype(np.dtype(np.float32), allow_nan=False, allow_infinity=False)


def shapes() -> Strategy:
    """Small shapes, including those of scalars and empty tensors."""
    return nps.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)


def bit_patterns(dtype: DType) -> Strategy:
    """Bit patterns as integers; special values are frequent: ±0, the smallest subnormals, ±inf and NaN."""
    sign = 1 << 8 * dtype.itemsize - 1
    corners = {0, 1, sign, sign + 1, sign - 1, 2 * sign - 1}
    if dtype.additive:
        with np.errstate(all="ignore"):
            reals = np.array([1, -1, np.inf, -np.inf, np.nan]).astype(dtype.real)
        corners |= set(reals.view(dtype.carrier).tolist())
    return st.sampled_from(sorted(corners)) | st.integers(0, 2 * sign - 1)


def carriers(dtype: DType, size: int) -> Strategy:
    """Arrays of bit patterns, [size]."""
    return nps.arrays(dtype.carrier, size, elements=bit_patterns(dtype))


@st.composite
def sparse_tensors(
    draw: st.DrawFn, values: Strategy = F32_VALUES, dtype: Any = np.float32, shape: Strategy | None = None
) -> SparseTensor:
    """Sparse tensors of any small shape with entries at any subset of their positions."""
    drawn = draw(shapes() if shape is None else shape)
    indices = np.flatnonzero(draw(nps.arrays(np.bool_, math.prod(drawn))))
    return SparseTensor(drawn, indices, draw(nps.arrays(dtype, len(indices), elements=values)))


def exact(tensor: SparseTensor) -> tuple[Any, ...]:
    """Return everything in a sparse tensor, comparable with ==, including the bits of its values."""
    return tensor.shape, tensor.indices.tolist(), tensor.values.dtype.str, tensor.values.tobytes().hex()


def entries(tensor: SparseTensor) -> dict[int, float]:
    """Return position -> value."""
    return dict(zip(tensor.indices.tolist(), tensor.values.tolist(), strict=True))


def value(dtype: DType, bits: int) -> float:
    """Return the real number that a bit pattern represents."""
    with np.errstate(all="ignore"):  # signalling NaNs
        return float(np.array([bits], dtype.carrier).view(dtype.real).astype(np.float64)[0])


def rounded(dtype: DType, number: float) -> int:
    """Return the bit pattern of a number, rounded to f32 and then to `dtype`; for F64 it is not rounded."""
    with np.errstate(all="ignore"):
        wide = np.array([number]).astype(dtype.compute)
        return int(wide.astype(dtype.real).view(dtype.carrier)[0])


def difference(dtype: DType, base: BitArray, tuned: BitArray) -> tuple[dict[int, float], dict[int, int]]:
    """Compute the difference between two tensors.

    Args:
        dtype: The dtype of both tensors.
        base: The bits of the base, [size].
        tuned: The bits of the tuned tensor, [size].

    Returns:
        Position -> f32 delta, and position -> tuned bits if rounding base + delta does not give these bits.
    """
    deltas: dict[int, float] = {}
    replacements: dict[int, int] = {}
    for position, (before, after) in enumerate(zip(base.tolist(), tuned.tolist(), strict=True)):
        if before == after:
            continue
        replacements[position] = after
        if not dtype.additive:
            continue
        with np.errstate(all="ignore"):
            delta = float(np.float32(value(dtype, after) - value(dtype, before)))
        if math.isfinite(delta) and delta != 0:
            deltas[position] = delta
            if rounded(dtype, value(dtype, before) + delta) == after:
                del replacements[position]
    return deltas, replacements


def changed(base: BitArray, tuned: BitArray) -> dict[int, int]:
    """Return position -> tuned bits for all positions whose bits differ."""
    pairs = zip(base.tolist(), tuned.tolist(), strict=True)
    return {position: after for position, (before, after) in enumerate(pairs) if before != after}


def applied(dtype: DType, base: BitArray, deltas: dict[int, float], replacements: dict[int, int]) -> list[int]:
    """Return the bit patterns of the base with deltas added and rounded, then replacements set."""
    bits = base.tolist()
    for position, delta in deltas.items():
        bits[position] = rounded(dtype, value(dtype, bits[position]) + delta)
    for position, replacement in replacements.items():
        bits[position] = replacement
    return bits


def taken(values: Any, shape: tuple[int, ...]) -> Any:
    """Return a dense tensor cropped or zero-padded to another shape of the same rank."""
    result = np.zeros(shape, values.dtype)
    for place in np.ndindex(*(min(pair) for pair in zip(values.shape, shape, strict=True))):
        result[place] = values[place]
    return result


def top_k(deltas: Sequence[tuple[str, Any]], k: int) -> dict[str, list[int]]:
    """Select the k largest magnitudes of all tensors; of equal ones, those of the first tensor and position.

    Args:
        deltas: Pairs of a tensor name and its values, [size].
        k: The number of entries to select.

    Returns:
        Tensor name -> selected positions, increasing.
    """
    ranked = sorted(
        (-abs(float(number)), tensor, position)
        for tensor, (_, delta) in enumerate(deltas)
        for position, number in enumerate(delta)
        if number != 0
    )
    chosen: dict[str, list[int]] = {name: [] for name, _ in deltas}
    for _, tensor, position in ranked[:k]:
        chosen[deltas[tensor][0]].append(position)
    return {name: sorted(positions) for name, positions in chosen.items()}
