"""Exact global top-k selection over many tensors, in bounded memory and with deterministic ties.

LoTA (arXiv 2406.16797, Algorithm 1) keeps the top 1 − s of |tuned − base| over all eligible weights *together*.
Sorting needs all of them in memory at once, and a comparison `>= threshold` keeps too many if magnitudes tie. The order
of non-negative floats is that of their bit patterns, so this module refines the threshold 16 bits at a time with
histograms (radix selection).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from taskvec_formats.sparse import Indices, true_positions

from ..arguments import real, said
from ..errors import MaskError, UsageError

FloatArray = npt.NDArray[np.floating[Any]]
Key = Hashable
Deltas = Callable[[], Iterable[tuple[Key, FloatArray]]]
_MAGNITUDE = np.uint32(0x7FFF_FFFF)


def entries_for(sparsity: float, eligible: int) -> int:
    """Return k = round((1 − s)·N), the number of entries that a sparsity keeps of N eligible weights.

    Args:
        sparsity: s, in (0, 1).
        eligible: N.

    Raises:
        UsageError: The sparsity is outside (0, 1).
        MaskError: k is 0.
    """
    sparsity = check_sparsity(sparsity)
    k = round((1 - sparsity) * eligible)
    if k == 0:
        raise MaskError(f"a sparsity of {sparsity} keeps none of {eligible:,} eligible weights")
    return k


def check_sparsity(sparsity: float) -> float:
    """Convert a sparsity to a float and check its range.

    Args:
        sparsity: The share of the eligible weights without an entry, in (0, 1).

    Raises:
        UsageError: The sparsity is not a number in (0, 1).
    """
    share = real("`sparsity`", sparsity)
    if not 0 < share < 1:
        raise UsageError(f"`sparsity` must be between 0 and 1, both excluded; found {said(sparsity)}")
    return share


@dataclass(frozen=True)
class TopK:
    """The result of a selection. It identifies the selected magnitudes without storing their positions.

    Attributes:
        threshold: The bit pattern of the k-th largest magnitude. All larger magnitudes are selected.
        ties: Part (a tensor, or a block of one) -> the number of its magnitudes equal to the threshold that are
            selected, the first ones by position.
    """

    threshold: np.uint32
    ties: dict[Key, int]

    def indices(self, name: Key, delta: FloatArray) -> Indices:
        """Return the selected flat positions of one part, int64, increasing.

        Args:
            name: The key of the part.
            delta: Its values, f32 [size], as in the selection.
        """
        bits = _magnitude_bits(delta)
        chosen = true_positions(bits >= self.threshold)
        tied = chosen[bits[chosen] == self.threshold]
        surplus = tied[self.ties.get(name, 0) :]
        return chosen if not len(surplus) else np.setdiff1d(chosen, surplus, assume_unique=True)


class Parts(Protocol):
    """Processes of which each has a part of the entries. Every part of a tensor follows the parts of those before."""

    @property
    def shard(self) -> int:
        """The number of this process."""

    def total(self, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the sums of the counts of all parts."""

    def gather_parts(self, value: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """Return the counts of each part, in their order."""


class _Alone:
    """The only process."""

    shard = 0

    def total(self, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return counts

    def gather_parts(self, value: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        return [value]


def top_k(
    deltas: Deltas, k: int, *, at_most: bool = False, parts: Parts | None = None, nonzero: str = "weights changed"
) -> TopK:
    """Select exactly the k entries of largest magnitude over all tensors.

    Memory: one tensor and 1 MiB.

    Args:
        deltas: A function that yields (part, f32 [size]). It is called three times and must yield the same order each
            time. Ties at the threshold go to the earlier part and the earlier position. Zeros are never selected; NaN
            is larger than any number.
        k: The number of entries.
        at_most: Whether to select all non-zero entries if there are fewer than k.
        parts: The processes that have the entries together. Each calls this with the part that it has, under the same
            keys, and gets its part of the selection. None is this process alone.
        nonzero: What the error says of the entries that are not zero, after their number.

    Raises:
        MaskError: Fewer than k deltas are non-zero.
    """
    parts = parts or _Alone()
    high = np.zeros(1 << 16, np.int64)
    for _, delta in deltas():
        high += np.bincount(_magnitude_bits(delta) >> 16, minlength=1 << 16)
        high[0] -= delta.size - np.count_nonzero(delta)
    high = parts.total(high)
    if at_most:
        k = min(k, int(high.sum()))
        if k == 0:
            return TopK(np.uint32(0xFFFF_FFFF), {})  # above every magnitude
    if high.sum() < k:
        raise MaskError(f"{k:,} entries are wanted but only {high.sum():,} {nonzero}")
    bucket, above = _bucket(high, k)

    low = np.zeros(1 << 16, np.int64)
    for _, delta in deltas():
        bits = _magnitude_bits(delta)
        low += np.bincount(bits[bits >> 16 == bucket] & 0xFFFF, minlength=1 << 16)
    value, above_in_bucket = _bucket(parts.total(low), k - above)
    threshold = np.uint32(bucket << 16 | value)

    tied = {name: int(np.count_nonzero(_magnitude_bits(delta) == threshold)) for name, delta in deltas()}
    # the order of the ties: tensor by tensor, and in each the parts in their order
    counts = np.stack(parts.gather_parts(np.array(list(tied.values()), np.int64)))
    before = np.cumsum(counts.T.reshape(-1)).reshape(counts.T.shape)[:, parts.shard] - counts[parts.shard]
    left = k - above - above_in_bucket - before
    return TopK(threshold, dict(zip(tied, np.clip(left, 0, counts[parts.shard]).tolist(), strict=True)))


def _magnitude_bits(delta: FloatArray) -> npt.NDArray[np.uint32]:
    return np.asarray(delta, np.float32).reshape(-1).view(np.uint32) & _MAGNITUDE


def _bucket(histogram: npt.NDArray[np.int64], k: int) -> tuple[int, int]:
    """Return the bucket that contains the k-th largest value, and the number of values in the buckets above it."""
    from_top = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(from_top, k))
    return len(histogram) - 1 - place, int(from_top[place] - histogram[len(histogram) - 1 - place])
