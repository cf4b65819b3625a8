"""Sizes of the parts of a `.lota` file, compared with the empirical entropy of its data.

The entropies are under models whose rates are counted in the same data, without the size of their parameters. No code
that uses the same models is smaller. Usage: python benchmarks/entropy.py FILE.lota BASE TUNED
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from taskvec_formats import LotaReader, ModelFolder
from taskvec_formats.dtypes import BitArray, DType

Counts = npt.NDArray[np.int64]


def entropy(counts: Counts) -> float:
    """The empirical entropy of a sequence of symbols.

    Args:
        counts: How often each symbol occurs.

    Returns:
        Bits of all symbols together.
    """
    held = counts[counts > 0].astype(np.float64)
    return float(held.sum() * np.log2(held.sum()) - held @ np.log2(held)) if len(held) else 0.0


def coins(heads: Counts, tosses: Counts) -> float:
    """The entropy of binary choices, with one rate per group.

    Args:
        heads: The number of positive choices of each group.
        tosses: The number of choices of each group.

    Returns:
        Bits of all choices together.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.where(part > 0, part * np.log2(tosses / part), 0.0) for part in (heads, tosses - heads)]
    return float(sum(part.sum() for part in parts))


def by_density(changed: npt.NDArray[np.bool_]) -> float:
    """Bits of the positions, with one rate per tensor."""
    return coins(np.array([np.count_nonzero(changed)]), np.array([changed.size]))


def by_lines(changed: npt.NDArray[np.bool_]) -> float:
    """Bits of the positions, with a rate that is the product of one per row and one per column."""
    rows, cols = changed.mean(1), changed.mean(0)
    rate = np.clip(np.outer(rows, cols) / changed.mean(), 1e-9, 1 - 1e-9)
    return float(-(np.log2(rate[changed]).sum() + np.log2(1 - rate[~changed]).sum()))


def exponents(bits: BitArray, dtype: DType) -> npt.NDArray[np.int64]:
    """The exponent of each element, int64."""
    assert dtype.mantissa is not None
    return (bits >> dtype.mantissa).astype(np.int64) & ((1 << 8 * dtype.itemsize - 1 - dtype.mantissa) - 1)


def steps(base: BitArray, tuned: BitArray, dtype: DType) -> float:
    """Bits of the steps between base and tuned bits, given the exponent of the base.

    Each has one bit of sign and a magnitude, whose bits below the 8 leading ones are counted as incompressible.
    """
    exponent = exponents(base, dtype)
    top = 8 * dtype.itemsize - 1
    before, after = (
        np.where(bits >> top, -(bits & ((1 << top) - 1)), bits)
        for bits in (base.astype(np.int64), tuned.astype(np.int64))
    )
    size = np.abs(after - before) - 1
    free = np.maximum(np.frexp(size.astype(np.float64))[1] - 8, 0)
    symbol = exponent * 65536 + free * 256 + (size >> free)
    given = entropy(np.unique(symbol, return_counts=True)[1]) - entropy(np.bincount(exponent))
    return len(base) + float(free.sum()) + given


def deltas(values: npt.NDArray[np.float32]) -> float:
    """Bits of f32 deltas, given exponent, 4 mantissa bits and the number of trailing zeros.

    The remaining bits are counted as incompressible.
    """
    bits = values.view(np.uint32).astype(np.int64)
    low = bits & ((1 << 19) - 1)
    zeros = np.where(low > 0, np.frexp((low & -low).astype(np.float64))[1] - 1, 19)
    symbol = (bits >> 19 & 0xFFF) * 32 + zeros
    return len(bits) + float(np.maximum(18 - zeros, 0).sum()) + entropy(np.bincount(symbol))


def report(path: Path, base_path: Path, tuned_path: Path) -> dict[str, float]:
    """Measure a file.

    Args:
        path: The `.lota` file.
        base_path: The base.
        tuned_path: The tuned model.

    Returns:
        Name -> bits per changed weight: of each stream, of the rest of the file, and of the entropies.
    """
    reader, base, tuned = LotaReader(path), ModelFolder(base_path), ModelFolder(tuned_path)
    patch = reader.header.kind == "patch"
    main, other = ("replacements", "delta") if patch else ("delta", "replacements")
    stored = {"positions": 0, "values": 0, "exceptions": 0}
    floor = {"density": 0.0, "lines": 0.0, "exponents": 0.0, "values": 0.0}
    changed = 0
    for name, spec in reader.specs.items():
        for block in spec.blocks:
            part, rest = getattr(block, main, None), getattr(block, other, None)
            if part:
                stored["positions"] += part.positions.length
                stored["values"] += part.values.length
            stored["exceptions"] += rest.length if rest else 0
        before, after = base.bits(name), tuned.bits(name)
        mask = before != after
        held = np.flatnonzero(mask)
        changed += len(held)
        floor["density"] += by_density(mask)
        floor["lines"] += by_lines(mask.reshape(spec.shape)) if len(spec.shape) == 2 else by_density(mask)
        exponent = exponents(before, spec.dtype)
        floor["exponents"] += coins(np.bincount(exponent[held], minlength=exponent.max() + 1), np.bincount(exponent))
        if patch:
            floor["values"] += steps(before[held], after[held], spec.dtype)
        else:
            floor["values"] += deltas(reader.change(name).delta.values)
    whole = path.stat().st_size
    return {
        "positions": 8 * stored["positions"] / changed,
        "H given density": floor["density"] / changed,
        "H given rows, columns": floor["lines"] / changed,
        "H given base exponent": floor["exponents"] / changed,
        "values": 8 * stored["values"] / changed,
        "H of values": floor["values"] / changed,
        "exceptions": 8 * stored["exceptions"] / changed,
        "all the rest": 8 * (whole - sum(stored.values())) / changed,
        "whole file": 8 * whole / changed,
    }


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    for what, bits in report(*map(Path, sys.argv[1:])).items():
        print(f"{bits:6.2f}  {what}")
