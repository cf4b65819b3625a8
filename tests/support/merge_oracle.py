"""Naive implementations of all merge methods, for one tensor per vector, position by position, in f32."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from support.oracle import entries
from taskvec_formats import SparseTensor

Held = dict[int, float]
MASK = 2**64 - 1


def f32(number: float) -> float:
    """Round a number to f32."""
    with np.errstate(all="ignore"):
        return float(np.float32(number))


def largest(held: Held, k: int) -> set[int]:
    """Return the positions of the k largest nonzero magnitudes; of equal ones, the first."""
    ranked = sorted((-abs(value), position) for position, value in held.items() if value != 0)
    return {position for _, position in ranked[:k]}


def trim(held: Held, density: float, size: int, dialect: str) -> Held:
    if density >= 1:
        return held
    k = {
        "reference": round(density * size),
        "mergekit": max(1, int(density * size)) if density > 0 and size else 0,
        "peft": int(density * size),
    }[dialect]
    kept = largest(held, k)
    return {position: value for position, value in held.items() if position in kept}


def outliers(held: Held, density: float, size: int, gamma: float) -> Held:
    if density >= 1:
        return held
    wanted = int(density * size)
    top = min(int(gamma * size), size - wanted)
    kept = largest(held, top + wanted) - largest(held, top)
    return {position: value for position, value in held.items() if position in kept}


def stays(seed: int, number: int, name: str, position: int, density: float) -> bool:
    """Whether DARE keeps a position: SplitMix64 of the position, in Python integers, compared with the density."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {number} {name}".encode()).digest()[:8], "little")
    z = (key + (position + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
    return (z ^ z >> 31) < round(density * 2**64)


def drop(held: Held, density: float, seed: int, number: int, name: str) -> Held:
    if density >= 1:
        return held
    return {position: value for position, value in held.items() if stays(seed, number, name, position, density)}


def probabilities(dense: Sequence[float], row: int, density: float, epsilon: float) -> list[float]:
    """Return the probability with which DELLA keeps each position: by the rank of its magnitude in its row."""
    found = [density] * len(dense)
    if row > 1:
        for first in range(0, len(dense), row):
            ranked = sorted(range(first, first + row), key=lambda position: (abs(dense[position]), position))
            for rank, position in enumerate(ranked):
                found[position] = (density - epsilon) + rank / (row - 1) * 2 * epsilon
    return found


def drawn_below(seed: int, number: int, name: str, position: int, share: float) -> bool:
    """Whether DELLA keeps a position that has this probability, with the draws of `stays`."""
    return stays(seed, number, name, position, int(share * 2**64) / 2**64)


def rescaled(before: Held, after: Held, density: float, how: str) -> Held:
    if how == "density" and 0 < density < 1:
        return {position: f32(value / f32(density)) for position, value in after.items()}
    if how == "norm":
        whole, rest = (sum(map(abs, held.values())) for held in (before, after))
        growth = 1.0 if min(whole, rest) < 1e-7 else f32(f32(whole) / f32(rest))
        return {position: f32(value * growth) for position, value in after.items()}
    return after


def pruned(
    method: str, number: int, tensor: SparseTensor, name: str, density: float, options: dict[str, Any]
) -> SparseTensor:
    """Return the entries of one tensor that a method keeps, rescaled.

    Args:
        method: The name of the method.
        number: The index of the vector in the merge.
        tensor: The tensor.
        name: Its name.
        density: The share of its elements to keep.
        options: Further options of the method.
    """
    held, size, dialect = entries(tensor), tensor.size, options.get("dialect", "reference")
    rescale = options.get("rescale")
    if method in ("ties", "magnitude_prune"):
        after = trim(held, density, size, "peft" if method == "magnitude_prune" else dialect)
    elif method.startswith("dare"):
        after = drop(held, density, options.get("seed", 0), number, name)
        rescale = rescale or ("norm" if dialect == "mergekit" else "density")
    elif method.startswith("della"):
        epsilon, row = options.get("epsilon", 0.15), size if len(tensor.shape) < 2 else tensor.shape[-1]
        shares = probabilities([held.get(position, 0.0) for position in range(size)], row, density, epsilon)
        kept = {p: v for p, v in held.items() if drawn_below(options.get("seed", 0), number, name, p, shares[p])}
        after = held if density >= 1 else kept if density > 0 else {}
        rescale = rescale or ("norm" if dialect == "mergekit" else "density")
        if rescale == "density" and 0 < density < 1:
            after, rescale = {p: f32(value / f32(shares[p])) for p, value in after.items()}, "none"
    elif method.startswith("breadcrumbs"):
        after = outliers(held, density, size, options.get("gamma", 0.01))
    else:
        return tensor
    after = rescaled(held, after, density, rescale or "none")
    return SparseTensor(tensor.shape, np.array(list(after), np.int64), np.array(list(after.values()), np.float32))


def combined(
    method: str, tensors: Sequence[SparseTensor], weights: Sequence[float], options: dict[str, Any]
) -> Held | None:
    """Return the merged entries of one tensor, or None if the method refuses to merge."""
    held = [entries(tensor) for tensor in tensors]
    factors = [f32(weight) for weight in weights]
    positions = sorted(set().union(*held))
    own = {"sce": sce, "ram": ram, "ramplus_tl": ram, "nearswap": nearswap}
    if method in own:
        return own[method](held, positions, tensors[0].size, {"method": method, **options})
    if method in ("linear", "dare_linear", "magnitude_prune", "breadcrumbs", "della_linear"):
        return linear(held, factors, positions, normalize=options.get("normalize", False))
    if method == "average":
        return linear(held, factors, positions, normalize=True)
    if method == "disjoint":
        return disjoint(held, factors, positions, options.get("on_overlap", "error"))
    dialect = options.get("dialect", "reference")
    divides = options.get("normalize", not (dialect == "mergekit" and method not in ("ties", "della")))
    return ties(held, factors, positions, dialect, options.get("elect", "mass"), divides)


def linear(held: list[Held], weights: list[float], positions: list[int], *, normalize: bool) -> Held | None:
    divisor = 0.0
    for weight in weights:
        divisor = f32(divisor + weight)
    if normalize and abs(divisor) < 1e-8:
        return None
    merged = {}
    for position in positions:
        total = 0.0
        for entry, weight in zip(held, weights, strict=True):
            if position in entry:
                total = f32(total + f32(entry[position] * weight))
        if normalize:
            total = f32(total / divisor)
        if total != 0:
            merged[position] = total
    return merged


def nearswap(held: list[Held], positions: list[int], size: int, options: dict[str, Any]) -> Held:
    limit = f32(options.get("t", 0.0001))
    moved = {p: f32(v * min(1.0, f32(limit / max(abs(v), f32(1e-6))))) for p, v in sorted(held[0].items())}
    return {position: value for position, value in moved.items() if value}


def sce(held: list[Held], positions: list[int], size: int, options: dict[str, Any]) -> Held:
    share = options.get("select_topk", 1.0)
    rows = [{position: entry.get(position, 0.0) for position in positions} for entry in held]
    if share < 1:
        spread = {p: f32(np.var([row[p] for row in rows])) for p in positions}
        count = int(sum(value != 0 for value in spread.values()) * share)
        kept = set(sorted(positions, key=lambda p: (-spread[p], p))[:count])
        rows = [{p: value if p in kept else 0.0 for p, value in row.items()} for row in rows]
    means = [f32(sum(f32(value * value) for value in row.values()) / max(size, 1)) for row in rows]
    whole = f32(sum(means))
    shares = [f32(1 / len(rows)) if whole < 1e-6 else f32(mean / whole) for mean in means]
    merged = {}
    for position in positions:
        values = [row[position] for row in rows]
        mass = 0.0
        for value in values:
            mass = f32(mass + value)
        total = divisor = 0.0
        for value, weight in zip(values, shares, strict=True):
            if value and (value > 0) == (mass >= 0):
                total, divisor = f32(total + f32(value * weight)), f32(divisor + weight)
        total = f32(total / max(divisor, f32(1e-6)))
        if total != 0:
            merged[position] = total
    return merged


def ram(held: list[Held], positions: list[int], size: int, options: dict[str, Any]) -> Held:
    method = options["method"]
    least = f32(options.get("epsilon", 1e-5))
    changes = [{p: v for p, v in entry.items() if abs(v) > least} for entry in held]
    counts = {p: sum(p in each for each in changes) for p in positions}
    factors = []
    for each in changes:
        single = sum(counts[p] == 1 for p in each)
        ratio = f32((len(each) - single) / f32(max(single, options.get("epsilon", 1e-5) or 1)))
        growth = f32(f32(options.get("r", 0.1)) * f32(min(ratio, options.get("alpha", 0.2))))
        factors.append(f32(1 + growth) if method == "ramplus_tl" else 1.0)
    merged = {}
    for position in positions:
        total = 0.0
        for each, factor in zip(changes, factors, strict=True):
            if position in each:
                value = each[position]
                total = f32(total + (f32(value * factor) if counts[position] == 1 else f32(value / counts[position])))
        if total != 0:
            merged[position] = total
    return merged


def disjoint(held: list[Held], weights: list[float], positions: list[int], on_overlap: str) -> Held | None:
    merged = {}
    for position in positions:
        values = [f32(e[position] * w) for e, w in zip(held, weights, strict=True) if position in e]
        if len(values) > 1 and on_overlap == "error":
            return None
        total = 0.0
        for value in values:
            total = f32(total + value)
        if on_overlap == "mean":
            total = f32(total / len(values))
        elif on_overlap == "larger":
            total = max(values, key=abs)  # the first of equals
        elif on_overlap == "first":
            total = values[0]
        merged[position] = total
    return merged


def ties(
    held: list[Held], weights: list[float], positions: list[int], dialect: str, elect: str, normalize: bool
) -> Held:
    merged = {}
    for position in positions:
        values = [(e[position], w) for e, w in zip(held, weights, strict=True) if position in e]
        voices = [value if dialect == "peft" else f32(value * weight) for value, weight in values]
        mass = 0.0
        for voice in voices:
            mass = f32(mass + (voice if elect == "mass" else float(np.sign(voice))))
        if mass == 0 and dialect == "reference":
            continue
        elected = 1 if mass >= 0 else -1
        total = divisor = 0.0
        for (value, weight), voice in zip(values, voices, strict=True):
            if np.sign(voice) == elected:
                total = f32(total + f32(value * weight))
                divisor = f32(divisor + (weight if dialect == "mergekit" else 1))
        if normalize:
            total = f32(total / (divisor or 1))
        if total != 0:
            merged[position] = total
    return merged
