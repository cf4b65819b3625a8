"""Set operations on positions: strictly increasing int64 arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from taskvec_formats.sparse import Indices


def common(a: Indices, b: Indices) -> tuple[Indices, Indices]:
    """Where two position lists agree: the places in a and in b, in O(|a| log |b|) with a the shorter."""
    if len(a) > len(b):
        in_b, in_a = common(b, a)
        return in_a, in_b
    if not len(a):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    place = np.minimum(np.searchsorted(b, a), len(b) - 1)
    in_a = np.flatnonzero(b[place] == a)
    return in_a, place[in_a]


_SCRATCH = 1 << 24  # positions for which a map of places is small enough to be made


def union(lists: Sequence[Indices], size: int) -> tuple[Indices, list[Indices]]:
    """Every position below `size` that any list holds, once, increasing; and the places there of each list's positions.

    Time and memory follow the lists; a map of all positions, which is quicker, is made only of as many as a block has.
    """
    if size <= _SCRATCH:
        held = np.zeros(size, bool)
        for positions in lists:
            held[positions] = True
        merged = np.flatnonzero(held)
        place = np.empty(size, np.int32)
        place[merged] = np.arange(len(merged), dtype=np.int32)
        return merged, [place[positions].astype(np.int64) for positions in lists]
    # numpy's stable sort finds the runs and merges them; np.unique would hash them, which is slower
    merged = np.sort(np.concatenate(lists), kind="stable")
    merged = merged[np.append(True, merged[1:] != merged[:-1])] if len(merged) else merged
    return merged, [np.searchsorted(merged, positions) for positions in lists]
