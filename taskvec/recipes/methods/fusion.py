"""Arcee Fusion: take over the changes that matter most, by their size and by how much they change each row.

Source: https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .engine import Function, Group, Values, WholeTensor

_EPSILON = 1e-8


def _pair(group: Group) -> tuple[Values, Values]:
    assert group.base is not None
    return group.inputs[group.base], group.inputs[group.others[0]]


def _importance(group: Group, row: int) -> Values:
    """|change| · KL(softmax(model row), softmax(base row)) for each weight, [n]."""
    base, other = (values.reshape(-1, row) for values in _pair(group))
    p, q = (group.r(group.r(_softmax(values)) + np.float32(_EPSILON)) for values in (other, base))
    divergence = group.r(p * group.r(np.log(group.r(p / q)))).sum(axis=1, keepdims=True, dtype=np.float64)
    found: Values = group.r(abs(group.r(other - base)) * group.r(divergence)).reshape(-1)
    return found


def _softmax(values: Values) -> Values:
    exponents = np.exp((values - values.max(axis=1, keepdims=True)).astype(np.float64))
    found: Values = exponents / exponents.sum(axis=1, keepdims=True)
    return found


def _threshold(tensor: WholeTensor) -> tuple[int, Any]:
    """The row length, and the median of the importance plus 1.5 times its interquartile range."""
    parts = [_importance(group, tensor.row) for group in tensor.groups()]
    if not parts:
        return tensor.row, 0.0
    r, importance = next(tensor.groups()).r, np.concatenate(parts)
    places = [int(np.float32(share) * np.float32(len(importance) - 1)) for share in (0.25, 0.5, 0.75)]
    low, median, high = np.partition(importance, places)[places]
    return tensor.row, r(median + r(r(high - low) * np.float32(1.5)))


def _fused(group: Group, measured: tuple[int, Any]) -> Values:
    row, threshold = measured
    base, other = _pair(group)
    found: Values = base + group.r(other - base) * (_importance(group, row) >= threshold)
    return found


ARCEE_FUSION = Function(_fused, _threshold, by_block=True)
