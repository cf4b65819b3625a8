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


def union(lists: Sequence[Indices]) -> Indices:
    """Every position that any list holds, once, increasing."""
    # numpy's stable sort finds the runs and merges them; np.unique would hash them, which is slower
    merged = np.sort(np.concatenate(lists), kind="stable")
    return merged[np.append(True, merged[1:] != merged[:-1])] if len(merged) else merged


def places_in(all_positions: Indices, positions: Indices) -> Indices:
    """Where each of `positions` stands in `all_positions`, which holds them all; int64 [len(positions)]."""
    return np.searchsorted(all_positions, positions)
