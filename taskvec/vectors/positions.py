"""Set operations on positions, given as strictly increasing int64 arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from taskvec_formats.sparse import Indices, true_positions


def common(a: Indices, b: Indices) -> tuple[Indices, Indices]:
    """Return the indices, in each of two position lists, of the positions that they have in common.

    Takes O(|a| log |b|) time, where a is the shorter list.

    Args:
        a: Positions.
        b: Positions.

    Returns:
        The indices in a and the indices in b, both int64 [n], increasing.
    """
    if len(a) > len(b):
        in_b, in_a = common(b, a)
        return in_a, in_b
    if not len(a):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    place = np.minimum(np.searchsorted(b, a), len(b) - 1)
    in_a = np.flatnonzero(b[place] == a)
    return in_a, place[in_a]


_SCRATCH = 1 << 24  # the largest number of positions for which a dense map is allocated


def union(lists: Sequence[Indices], size: int) -> tuple[Indices, list[Indices]]:
    """Return the union of position lists, and the index of each list's positions in it.

    Time and memory are proportional to the lists. A dense map of all positions, which is faster, is used only if `size`
    is at most the size of a block.

    Args:
        lists: Positions below `size`.
        size: The number of elements of the tensor.

    Returns:
        The union, increasing, and for each list the indices of its positions in the union.
    """
    if size <= _SCRATCH:
        held = np.zeros(size, bool)
        for positions in lists:
            held[positions] = True
        merged = true_positions(held)
        place = np.empty(size, np.int32)
        place[merged] = np.arange(len(merged), dtype=np.int32)
        return merged, [place[positions].astype(np.int64) for positions in lists]
    # numpy's stable sort detects and merges sorted runs; np.unique uses a hash table, which is slower here
    merged = np.sort(np.concatenate(lists), kind="stable")
    merged = merged[np.append(True, merged[1:] != merged[:-1])] if len(merged) else merged
    return merged, [np.searchsorted(merged, positions) for positions in lists]
