"""Merges of whole dense tensors in f32, after the papers, to compare merges of sparse vectors with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def trimmed(vector: Mapping[str, np.ndarray], density: float) -> dict[str, np.ndarray]:
    """Set all but the largest magnitudes of a whole vector to zero; of equal ones, the first stay.

    Args:
        vector: Tensor name -> its deltas. Of the weights in the tensors that are not zero, round(density · N) are kept.
        density: The share.
    """
    changed = sorted(name for name, delta in vector.items() if delta.any())
    whole = np.concatenate([vector[name].reshape(-1) for name in changed])
    whole[np.argsort(-abs(whole), kind="stable")[round(density * whole.size) :]] = 0
    parts = np.split(whole, np.cumsum([vector[name].size for name in changed])[:-1])
    result = {name: np.zeros_like(delta) for name, delta in vector.items()}
    return result | {name: part.reshape(vector[name].shape) for name, part in zip(changed, parts, strict=True)}


def merged(method: str, deltas: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Merge the deltas of one tensor.

    Args:
        method: "linear", the sum; or "ties", the mean of those that have the sign of the sum.
        deltas: The deltas, f32, in the tensor's shape.
        weights: A factor of each.
    """
    parts = [delta * np.float32(weight) for delta, weight in zip(deltas, weights, strict=True)]
    total = np.zeros_like(parts[0])
    for part in parts:
        total += part
    if method == "linear":
        return total
    sign, chosen, count = np.sign(total), np.zeros_like(total), np.zeros_like(total)
    for part in parts:
        agrees = (np.sign(part) == sign) & (sign != 0)
        chosen += np.where(agrees, part, np.float32(0))
        count += agrees
    return chosen / np.maximum(count, np.float32(1))
