"""Every merge method equals its dense definition; what cannot be merged is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from building import BASE, sparse, tensor, vector_of, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from taskvec import TaskVector, apply, diff, merge
from taskvec.errors import BaseMismatchError, MergeError, UsageError
from taskvec.merging import METHODS
from taskvec_formats import Checkpoint, Identity, SparseTensor

SHAPE = (3, 4)
# few distinct values, so that sums cancel, and some that do not add up exactly
VALUES = st.sampled_from([0.0, 1.0, -1.0, 0.5, -2.0]) | st.floats(-1e3, 1e3, width=32, allow_subnormal=False)
WEIGHTS = st.integers(-20, 20).map(lambda tenths: tenths / 10)
TENSORS = oracle.sparse_tensors(VALUES, shape=st.just(SHAPE))
Weighted = tuple[list[SparseTensor], list[float]]


@st.composite
def meeting(draw: st.DrawFn) -> Weighted:
    """Two to four tensors whose masks are free to meet, and their weights."""
    tensors = draw(st.lists(TENSORS, min_size=2, max_size=4))
    return tensors, draw(st.lists(WEIGHTS, min_size=len(tensors), max_size=len(tensors)))


@st.composite
def separate(draw: st.DrawFn) -> Weighted:
    """The entries of one tensor dealt out to two to four, and their weights."""
    whole = draw(TENSORS)
    count = draw(st.integers(2, 4))
    owners = np.array(draw(st.lists(st.integers(0, count - 1), min_size=len(whole), max_size=len(whole))), int)
    parts = [SparseTensor(SHAPE, whole.indices[owners == i], whole.values[owners == i]) for i in range(count)]
    return parts, draw(st.lists(WEIGHTS, min_size=count, max_size=count))


def vectors_of(tensors: Sequence[SparseTensor]) -> list[TaskVector]:
    return [vector_of({"w": each}, name=f"vector {i}") for i, each in enumerate(tensors)]


@pytest.mark.parametrize("method", METHODS)
@given(weighted=meeting() | separate())
def test_a_method_equals_its_dense_definition(method: str, weighted: Weighted) -> None:
    tensors, weights = weighted
    expected = getattr(oracle, method)(tensors, weights)
    merged = merge(vectors_of(tensors), method, weights)
    if expected is None:
        with pytest.raises(MergeError, match=r"^tensor 'w': \d+ positions are held by more than one vector"):
            merged["w"]
        return
    assert oracle.entries(merged["w"]) == expected
    assert (merged["w"].shape, merged["w"].values.dtype) == (SHAPE, np.float32)
    assert len(merged.change("w").replacements) == 0


@given(separate())
def test_where_masks_do_not_meet_ties_keeps_every_weighted_value(weighted: Weighted) -> None:
    tensors, weights = weighted
    by_ties, by_union = (merge(vectors_of(tensors), method, weights)["w"] for method in ("ties", "disjoint"))
    moved = by_union.values != 0
    assert oracle.exact(by_ties) == oracle.exact(SparseTensor(SHAPE, by_union.indices[moved], by_union.values[moved]))


@pytest.mark.parametrize("method", METHODS)
@given(weighted=separate())
def test_where_masks_do_not_meet_the_order_does_not_matter(method: str, weighted: Weighted) -> None:
    tensors, weights = weighted
    forth = merge(vectors_of(tensors), method, weights)["w"]
    back = merge(vectors_of(tensors[::-1]), method, weights[::-1])["w"]
    assert oracle.exact(forth) == oracle.exact(back)


@given(meeting() | separate())
def test_auto_takes_the_union_unless_masks_meet_and_says_why(weighted: Weighted) -> None:
    tensors, weights = weighted
    merged = merge(vectors_of(tensors), weights=weights)
    positions = [position for each in tensors for position in each.indices.tolist()]
    if len(positions) == len(set(positions)):
        chosen = ("disjoint", "no two masks share a position")
    else:
        chosen = ("ties", "the masks meet, first in w")
    assert (merged.provenance["method"], merged.provenance["reason"]) == chosen
    assert oracle.entries(merged["w"]) == getattr(oracle, chosen[0])(tensors, weights)


def test_a_mean_of_agreeing_values_is_not_pulled_down_by_the_outvoted() -> None:
    a, b, c = sparse((3,), {0: 3, 1: 1}), sparse((3,), {0: 1, 1: -1}), sparse((3,), {0: -2, 2: 5})
    assert oracle.entries(merge(vectors_of([a, b, c]), "ties")["w"]) == {0: 2.0, 2: 5.0}


def test_a_weight_is_not_divided_out_where_one_vector_stands_alone() -> None:
    a, b = sparse((2,), {0: 3}), sparse((2,), {1: 4})
    assert oracle.entries(merge(vectors_of([a, b]), "ties", [0.5, -2])["w"]) == {0: 1.5, 1: -8.0}


def test_a_tensor_that_few_vectors_hold_is_merged_from_those() -> None:
    vectors = [
        vector_of({"a": sparse((2,), {0: 1})}),
        vector_of({"a": sparse((2,), {0: 1}), "b": sparse((3,), {2: 4})}),
    ]
    merged = merge(vectors, "linear", [2, 3])
    assert {name: oracle.entries(merged[name]) for name in merged} == {"a": {0: 5.0}, "b": {2: 12.0}}


def test_the_provenance_names_method_weights_and_parents() -> None:
    parents = [vector_of({"w": sparse((2,), {0: 1})}, name=name) for name in ("a.lota", "b.lota")]
    parents[0].provenance["made_by"] = "train"
    assert merge(parents, "linear", [1, 0.5]).provenance == {
        "made_by": "merge",
        "method": "linear",
        "reason": "asked for",
        "weights": [1.0, 0.5],
        "parents": [{"name": "a.lota", "made_by": "train"}, {"name": "b.lota"}],
    }


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_one_vector_merges_to_itself(method: str) -> None:
    only = sparse((5,), {1: 2, 3: -4})
    merged = merge(vectors_of([only]), method)
    assert oracle.exact(merged["w"]) == oracle.exact(only)
    assert merged.base == BASE


def test_a_saved_merge_is_the_lazy_one(tmp_path: Path) -> None:
    vectors = vectors_of([sparse((4,), {0: 1, 2: -1}), sparse((4,), {2: 3, 3: 0})])
    merged = merge(vectors)
    merged.save(tmp_path / "merged.lota")
    opened = TaskVector.open(tmp_path / "merged.lota")
    assert opened.provenance == merged.provenance
    assert oracle.exact(opened["w"]) == oracle.exact(merged["w"])


def test_a_merge_of_packed_vectors_applies_to_their_base(tmp_path: Path) -> None:
    values = {"base": [1.0, 2, 3, 4], "first": [1.5, 2, 3, 4], "second": [1.0, 2, 2.5, 4]}
    states = {name: write_checkpoint(tmp_path / name, {"w": tensor("F32", v)}) for name, v in values.items()}
    vectors = [diff(states["base"], states[name]) for name in ("first", "second")]
    apply(merge(vectors, weights=[1, 2]), states["base"], tmp_path / "out")
    assert Checkpoint(tmp_path / "out").bits("w").view(np.float32).tolist() == [1.5, 2, 2, 4]


def test_vectors_of_different_bases_are_refused() -> None:
    delta = {"w": sparse((2,), {0: 1})}
    other = vector_of(delta, Identity("other", "0" * 64))
    with pytest.raises(BaseMismatchError, match=r"different bases: base \(ba5e.*\) and other \(0000"):
        merge([vector_of(delta), other])


def test_tensors_of_different_shapes_are_refused_by_name() -> None:
    with pytest.raises(BaseMismatchError, match=r"'w' is F32 \[2\] in one vector and F32 \[1, 2\] in another"):
        merge(vectors_of([sparse((2,), {0: 1}), sparse((1, 2), {0: 1})]))


def test_changes_that_cannot_be_added_are_refused_by_name(tmp_path: Path) -> None:
    base, tuned = (write_checkpoint(tmp_path / f"{v}", {"ids": tensor("I64", [v])}) for v in (1, 2))
    with pytest.raises(MergeError, match="'ids' is I64: its changes cannot be added"):
        merge([diff(base, tuned)])


@pytest.mark.parametrize("method", METHODS)
def test_a_sum_beyond_the_largest_f32_is_refused_by_name(method: str) -> None:
    merged = merge(vectors_of([sparse((2,), {0: 1}), sparse((2,), {1: 1})]), method, [1, 1e39])
    with pytest.raises(MergeError, match="tensor 'w'"):
        merged["w"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "average"}, "no merge method 'average'; there are auto, linear, disjoint, ties"),
        ({"weights": [1.0]}, "1 weights for 2 vectors"),
        ({"weights": []}, "0 weights for 2 vectors"),
        ({"weights": [1.0, float("nan")]}, "finite number, found nan"),
        ({"weights": [float("-inf"), 1.0]}, "finite number, found -inf"),
    ],
)
def test_a_request_that_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    vectors = vectors_of([sparse((2,), {0: 1}), sparse((2,), {1: 1})])
    with pytest.raises(UsageError, match=message):
        merge(vectors, **options)


def test_nothing_cannot_be_merged() -> None:
    with pytest.raises(UsageError, match="at least one vector"):
        merge([])


@pytest.mark.parametrize("method", METHODS)
def test_no_method_changes_its_inputs(method: str) -> None:
    tensors = [sparse((4,), {0: 1, 2: -1}), sparse((4,), {1: 3})]
    before = [oracle.exact(each) for each in tensors]
    function: Callable[..., SparseTensor] = METHODS[method].function
    function(tensors, [2.0, 3.0])
    assert [oracle.exact(each) for each in tensors] == before
