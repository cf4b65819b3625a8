"""Methods on whole models that compute each weight by itself: the average, NearSwap, and one model, scaled."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import MergeError
from .engine import Function, Group, Values, WholeTensor


def _divisor(tensor: WholeTensor) -> Any:
    total = np.float32(0)
    for weight in tensor.numbers["weight"]:
        total += np.float32(weight)
    if not tensor.numbers["normalize"]:
        return None
    if total == 0:
        raise MergeError("the weights add up to 0, so there is no average")
    if not np.isfinite(total):
        raise MergeError("the weights leave the range of f32")
    return total


def _average(group: Group, divisor: Any) -> Values:
    """Σ wᵢ·mᵢ / Σ wᵢ (Wortsman et al., "Model soups", arXiv 2203.05482), or the sum alone."""
    total = np.zeros(len(group.inputs[0]), group.dtype.compute)
    for values, weight in zip(group.inputs, group.numbers["weight"], strict=True):
        # torch uses a fused multiply-add, which does not round the product
        total = (total + values.astype(np.float64) * np.float64(np.float32(weight))).astype(total.dtype)
    return total if divisor is None else total / divisor


def _nearswap(group: Group, _: Any) -> Values:
    """s·m + (1 − s)·b with s = t / |m − b|, at most 1.

    Source: https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001.
    """
    assert group.base is not None
    base, other = group.inputs[group.base], group.inputs[group.others[0]]
    apart = np.maximum(group.r(abs(group.r(base - other))), group.r(1e-6))
    # torch computes t / x as (1 / x)·t
    share = np.clip(group.r(group.r(1 / apart) * np.float32(group.numbers["t"])), 0, 1)
    found: Values = group.r(group.r(share * other) + group.r(group.r(1 - share) * base))
    return found


def _scaled(group: Group, _: Any) -> Values:
    scale = group.numbers["scale"][0]
    found: Values = group.inputs[0] if scale is None else group.r(group.inputs[0] * np.float32(scale))
    return found


AVERAGE = Function(_average, _divisor)
NEARSWAP = Function(_nearswap)
SCALED = Function(_scaled)
