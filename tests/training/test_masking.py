"""Masks from elsewhere than the largest changes of all: shares, random, other vectors, what earlier masks leave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from support import oracle

from taskvec import TaskVector
from taskvec.errors import KindError, MaskError
from taskvec.training.masking import free_share, largest, mask_of, quotas, random_mask, taken_by, top_k_each
from taskvec.vectors.source import Memory
from taskvec_formats import Form, Header, Identity, SparseTensor, TensorSpec
from taskvec_formats.dtypes import DTYPES

F32 = DTYPES["F32"]
FORMS = {"a": Form(F32, (3, 4)), "b": Form(F32, (5,)), "c": Form(F32, (2, 2))}
FLAT = [(name, place) for name, form in FORMS.items() for place in range(form.size)]


def vector_of(
    entries: Mapping[str, Mapping[int, float]], forms: Mapping[str, Form] = FORMS, kind: str = "vector"
) -> Any:
    """A vector in memory: tensor -> position -> delta."""
    specs = {name: TensorSpec.like(name, forms[name]) for name in entries}
    deltas = {
        name: SparseTensor(
            forms[name].shape, np.array(sorted(held), np.int64), np.array([held[at] for at in sorted(held)], np.float32)
        )
        for name, held in entries.items()
    }
    header = Header(kind, Identity("base", "0" * 64), None, tensors=())
    return TaskVector(header, specs.values(), Memory(deltas, specs), "v.lota")


def as_sets(masks: Mapping[str, Any]) -> set[tuple[str, int]]:
    for mask in masks.values():
        assert mask.dtype == np.int64
        assert (np.diff(mask) > 0).all()
    return {(name, int(place)) for name, mask in masks.items() for place in mask}


@st.composite
def vectors(draw: st.DrawFn) -> TaskVector:
    values = st.sampled_from([0.0, -1.0, 1.0, 2.0, -3.0, 0.5])
    held = draw(st.dictionaries(st.sampled_from(FLAT), values))
    return vector_of(
        {name: {at: value for (n, at), value in held.items() if n == name} for name in {name for name, _ in held}}
    )


def held_by(vector: TaskVector) -> set[tuple[str, int]]:
    return {(name, int(place)) for name in vector for place in vector[name].indices}


@given(st.integers(0, 40), st.dictionaries(st.text(max_size=3), st.integers(1, 50), min_size=1, max_size=5))
def test_quotas_add_up_and_are_the_shares_rounded(k: int, sizes: dict[str, int]) -> None:
    total = sum(sizes.values())
    k = min(k, total)
    shares = quotas(k, sizes)
    assert sum(shares.values()) == k
    for name, size in sizes.items():
        assert abs(shares[name] - k * size / total) < 1
        assert shares[name] <= size


def test_what_is_cut_off_goes_to_the_first_of_equals() -> None:
    assert quotas(4, {"a": 1, "b": 1, "c": 1}) == {"a": 2, "b": 1, "c": 1}
    assert quotas(5, {"a": 10, "b": 90}) == {"a": 1, "b": 4}  # half a share each: a stands first


@given(st.lists(nps.arrays(np.float32, st.integers(1, 9), elements=st.sampled_from([0.0, 1.0, -1.0, 2.0])), min_size=1))
def test_each_tensor_by_itself_is_a_full_sort_of_it(arrays: list[Any]) -> None:
    deltas = [(str(i), array) for i, array in enumerate(arrays)]
    wanted = {name: int(np.count_nonzero(delta)) // 2 for name, delta in deltas}
    masks = top_k_each(deltas, wanted)
    for name, delta in deltas:
        expected = oracle.top_k([(name, delta)], wanted[name])[name] if wanted[name] else []
        assert masks[name].tolist() == expected


@given(vectors(), st.lists(vectors(), max_size=2), st.sampled_from(["global", "tensor"]), st.data())
def test_the_largest_scores_that_are_free_as_a_full_sort_gives_them(
    vector: TaskVector, earlier: list[TaskVector], scope: str, data: st.DataObject
) -> None:
    taken = taken_by(earlier, FORMS)
    scores = {name: np.zeros(form.size, np.float32) for name, form in FORMS.items()}
    for name in vector:
        scores[name][vector[name].indices] = vector[name].values
    free = {(n, at): abs(float(v)) for n, values in scores.items() for at, v in enumerate(values)}
    free = {place: size for place, size in free.items() if size and place not in as_sets(taken)}
    k = data.draw(st.integers(1, len(FLAT)))
    wanted = quotas(k, {name: form.size for name, form in FORMS.items()})
    groups = [(list(FORMS), k)] if scope == "global" else [([name], wanted[name]) for name in FORMS]
    ranked = sorted(free, key=lambda place: (-free[place], place))
    chosen = [[place for place in ranked if place[0] in names][:count] for names, count in groups]
    if any(len(part) < count for part, (_, count) in zip(chosen, groups, strict=True)):
        with pytest.raises(MaskError, match="entries are wanted but only"):
            largest(lambda name: scores[name].copy(), FORMS, k, scope, taken)
    else:
        masks = largest(lambda name: scores[name].copy(), FORMS, k, scope, taken)
        assert as_sets(masks) == {place for part in chosen for place in part}


def test_a_tensor_that_changed_too_little_is_named() -> None:
    deltas = [("a", np.ones(3, np.float32)), ("b", np.array([0, 1, 0], np.float32))]
    with pytest.raises(MaskError, match="tensor 'b': 2 entries are wanted but only 1 weights changed"):
        top_k_each(deltas, {"a": 2, "b": 2})


@settings(max_examples=50)
@given(st.lists(vectors(), max_size=3), st.data())
def test_a_random_mask_has_k_of_the_free_positions(earlier: list[TaskVector], data: st.DataObject) -> None:
    taken = taken_by(earlier, FORMS)
    assert as_sets(taken) == set().union(*map(held_by, earlier))
    free = set(FLAT) - as_sets(taken)
    k, seed = data.draw(st.integers(1, len(free))), data.draw(st.integers(0, 3))
    masks = random_mask(k, FORMS, taken, seed)
    assert len(as_sets(masks)) == k
    assert as_sets(masks) <= free
    again = random_mask(k, FORMS, taken, seed)
    assert as_sets(again) == as_sets(masks)
    counts = [{name: len(held) for name, held in each.items()} for each in (taken, masks)]
    shares = free_share(counts, FORMS)
    for name, form in FORMS.items():
        left = [place for n, place in free - as_sets(masks) if n == name]
        assert shares[name] == pytest.approx(len(left) / form.size)


def test_more_random_positions_than_are_free_are_refused() -> None:
    with pytest.raises(MaskError, match="20 entries are wanted but only 19"):
        random_mask(20, FORMS, {"b": np.array([1, 2])}, 0)


def test_a_random_mask_favours_no_position() -> None:
    drawn = [as_sets(random_mask(7, FORMS, {"b": np.array([1, 2])}, seed)) for seed in range(3000)]
    counts = {place: sum(place in mask for mask in drawn) for place in FLAT}
    assert counts.pop(("b", 1)) == counts.pop(("b", 2)) == 0
    # 7 of 19; the standard deviation of a count is 26
    assert all(abs(count - 3000 * 7 / 19) < 5 * 27 for count in counts.values())


@given(vectors(), st.lists(vectors(), max_size=2), st.data())
def test_the_mask_of_a_vector_is_its_free_positions_or_the_largest_of_them(
    vector: TaskVector, earlier: list[TaskVector], data: st.DataObject
) -> None:
    taken = taken_by(earlier, FORMS)
    free = held_by(vector) - as_sets(taken)
    if not free:
        with pytest.raises(MaskError, match=r"v\.lota contains no position that is free"):
            mask_of(vector, FORMS, taken, None)
    else:
        assert as_sets(mask_of(vector, FORMS, taken, None)) == free
    values = {(name, at): float(vector[name].values[i]) for name in vector for i, at in enumerate(vector[name].indices)}
    ranked = sorted((place for place in free if values[place]), key=lambda place: (-abs(values[place]), place))
    k = data.draw(st.integers(1, len(FLAT)))
    if k > len(ranked):
        with pytest.raises(MaskError, match=rf"v\.lota: {k} entries are wanted but only {len(ranked)}"):
            mask_of(vector, FORMS, taken, k)
    else:
        assert as_sets(mask_of(vector, FORMS, taken, k)) == set(ranked[:k])


def test_a_mask_that_does_not_fit_is_refused() -> None:
    other = {**FORMS, "d": Form(F32, (1,)), "b": Form(F32, (6,))}
    for use in (lambda v: mask_of(v, FORMS, {}, None), lambda v: taken_by([v], FORMS)):
        with pytest.raises(MaskError, match=r"v\.lota contains tensor 'd', which is not eligible here"):
            use(vector_of({"d": {0: 1}}, other))
        with pytest.raises(MaskError, match=r"tensor 'b' is \[6\] in v\.lota, \[5\] here"):
            use(vector_of({"b": {0: 1}}, other))
        with pytest.raises(KindError, match=r"v\.lota is a patch"):
            use(vector_of({"a": {0: 1}}, kind="patch"))
