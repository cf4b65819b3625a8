"""The difference of two tensors gives the second one back, bit for bit, whatever the bits are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from support.oracle import applied, bit_patterns, carriers, changed, difference, entries, shapes, sparse_tensors

from taskvec.vectors.delta import apply_range, diff_range, replace_range, touched_bits
from taskvec_formats import Change, SparseTensor
from taskvec_formats.dtypes import DTYPES, BitArray, DType

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
FLOATS = [dtype for dtype in DTYPES.values() if dtype.additive]


@st.composite
def states(draw: st.DrawFn, dtype: DType) -> tuple[BitArray, BitArray]:
    """Two tensors of one length that differ anywhere, everywhere or nowhere."""
    size = math.prod(draw(shapes()))
    base, other = draw(carriers(dtype, size)), draw(carriers(dtype, size))
    return base, np.where(draw(nps.arrays(np.bool_, size)), other, base)


@st.composite
def changes(draw: st.DrawFn, dtype: DType) -> tuple[BitArray, Change]:
    """A base, and any change of it: entries and replacements that meet or do not."""
    size = math.prod(draw(shapes()))
    shape = st.just((size,))
    # tensors that cannot be added have no additive entries
    delta = draw(sparse_tensors(shape=shape)) if dtype.additive else SparseTensor.empty((size,))
    replacements = draw(sparse_tensors(bit_patterns(dtype), dtype.carrier, shape))
    return draw(carriers(dtype, size)), Change(delta, replacements)


@every_dtype
@settings(max_examples=30)
@given(data=st.data())
def test_applying_the_difference_gives_the_tuned_bits(dtype: DType, data: st.DataObject) -> None:
    base, tuned = data.draw(states(dtype))
    before = base.copy()
    for change in (diff_range(dtype, base, tuned), replace_range(base, tuned)):
        assert apply_range(dtype, base, change).tobytes() == tuned.tobytes()
        assert base.tobytes() == before.tobytes()


@every_dtype
@settings(max_examples=30)
@given(data=st.data())
def test_entries_and_replacements_are_those_of_the_definition(dtype: DType, data: st.DataObject) -> None:
    base, tuned = data.draw(states(dtype))
    added, replaced = diff_range(dtype, base, tuned), replace_range(base, tuned)
    assert (entries(added.delta), entries(added.replacements)) == difference(dtype, base, tuned)
    assert (entries(replaced.delta), entries(replaced.replacements)) == ({}, changed(base, tuned))
    for change in (added, replaced):
        assert change.touched().tolist() == np.flatnonzero(base != tuned).tolist()
        assert (change.delta.shape, change.delta.values.dtype) == (base.shape, np.float32)
        assert (change.replacements.shape, change.replacements.values.dtype) == (base.shape, dtype.carrier)


@every_dtype
@settings(max_examples=30)
@given(data=st.data())
def test_a_change_is_applied_as_by_its_definition(dtype: DType, data: st.DataObject) -> None:
    base, change = data.draw(changes(dtype))
    expected = applied(dtype, base, entries(change.delta), entries(change.replacements))
    result = apply_range(dtype, base, change)
    # a NaN that arithmetic made may have any payload: those of the oracle need not be the same
    made = set(entries(change.delta)) - set(entries(change.replacements))
    for position, (found, wanted) in enumerate(zip(result.tolist(), expected, strict=True)):
        nan = position in made and bool(np.isnan(np.array(wanted, dtype.carrier).view(dtype.real)))
        assert found == wanted or (nan and np.isnan(np.array(found, dtype.carrier).view(dtype.real))), position


@every_dtype
@settings(max_examples=30)
@given(data=st.data())
def test_touched_elements_are_given_before_and_after(dtype: DType, data: st.DataObject) -> None:
    base, change = data.draw(changes(dtype))
    touched, (before, after) = change.touched(), touched_bits(dtype, base, change)
    assert touched.tolist() == sorted({*entries(change.delta), *entries(change.replacements)})
    assert before.tobytes() == base[touched].tobytes()
    assert after.tobytes() == apply_range(dtype, base, change)[touched].tobytes()


@every_dtype
@settings(max_examples=30)
@given(data=st.data())
def test_elements_without_an_entry_keep_their_bits(dtype: DType, data: st.DataObject) -> None:
    base, change = data.draw(changes(dtype))
    result = apply_range(dtype, base, change)
    untouched = np.setdiff1d(np.arange(base.size), change.touched())
    assert result[untouched].tobytes() == base[untouched].tobytes()
    assert result[change.replacements.indices].tobytes() == change.replacements.values.tobytes()


@every_dtype
@pytest.mark.parametrize("size", [0, 1, 4])
def test_equal_tensors_have_an_empty_difference(dtype: DType, size: int) -> None:
    bits = np.full(size, 7, dtype.carrier)
    for change in (diff_range(dtype, bits, bits.copy()), replace_range(bits, bits.copy())):
        assert (len(change.delta), len(change.replacements), len(change.touched())) == (0, 0, 0)


def near_pair(dtype: DType) -> tuple[Any, Any]:
    """Weights of usual size, and the same after a fine-tune that moves each by 1 % of the spread."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=20_000)
    return base.astype(dtype.real), (base + 0.01 * rng.normal(size=base.size)).astype(dtype.real)


@pytest.mark.parametrize(("name", "share"), [("F32", 0.01), ("F16", 0), ("BF16", 0), ("F8_E4M3", 0.01)])
def test_a_usual_fine_tune_needs_few_replacements(name: str, share: float) -> None:
    dtype = DTYPES[name]
    base, tuned = (values.view(dtype.carrier) for values in near_pair(dtype))
    change = diff_range(dtype, base, tuned)
    assert len(change.delta) > 1000
    assert len(change.replacements) <= share * len(change.delta)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
def test_a_changed_sign_of_zero_is_a_replacement(dtype: DType) -> None:
    zeros = np.array([0.0, -0.0]).astype(dtype.real).view(dtype.carrier)
    change = diff_range(dtype, zeros, zeros[::-1].copy())
    assert len(change.delta) == 0
    assert entries(change.replacements) == {0: zeros[1], 1: zeros[0]}
