"""Set operations on positions equal those of Python sets."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from taskvec.vectors.positions import common, union
from taskvec_formats.sparse import Indices

# few distinct positions, so that lists meet, and some far apart
POSITIONS = st.sets(st.integers(0, 12) | st.integers(0, 1 << 48)).map(lambda held: np.array(sorted(held), np.int64))


@given(POSITIONS, POSITIONS)
def test_common_gives_the_places_of_the_intersection_in_both(a: Indices, b: Indices) -> None:
    in_a, in_b = common(a, b)
    assert a[in_a].tolist() == b[in_b].tolist() == sorted(set(a.tolist()) & set(b.tolist()))


@given(st.lists(POSITIONS, min_size=1, max_size=4))
def test_union_holds_every_position_once_in_order_with_and_without_a_map(lists: list[Indices]) -> None:
    expected = sorted(set().union(*(each.tolist() for each in lists)))
    near = [each[each < 20] for each in lists]
    for given_lists, size, wanted in (
        (lists, (1 << 48) + 1, expected),
        (near, 20, [position for position in expected if position < 20]),
    ):
        merged, places = union(given_lists, size)
        assert merged.tolist() == wanted
        assert merged.dtype == np.int64
        assert [merged[own].tolist() for own in places] == [each.tolist() for each in given_lists]
