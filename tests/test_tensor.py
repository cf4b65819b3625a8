"""The difference of two tensors gives the second one back, bit for bit, whatever the bits are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from oracle import bit_patterns, carriers, difference, entries, shapes, sparse_tensors

from taskvec.tensor import apply_tensor, diff_tensor
from taskvec_formats import SparseTensor
from taskvec_formats.dtypes import DTYPES, BitArray, DType

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
FLOATS = [dtype for dtype in DTYPES.values() if dtype.additive]


@st.composite
def states(draw: st.DrawFn, dtype: DType) -> tuple[tuple[int, ...], BitArray, BitArray]:
    """A shape and two tensors of it that differ anywhere, everywhere or nowhere."""
    shape = draw(shapes())
    size = math.prod(shape)
    base, other = draw(carriers(dtype, size)), draw(carriers(dtype, size))
    return shape, base, np.where(draw(nps.arrays(np.bool_, size)), other, base)


@every_dtype
@settings(max_examples=60)
@given(data=st.data())
def test_applying_the_difference_gives_the_tuned_bits(dtype: DType, data: st.DataObject) -> None:
    shape, base, tuned = data.draw(states(dtype))
    before = base.copy()
    delta, exceptions = diff_tensor(dtype, shape, base, tuned)
    assert apply_tensor(dtype, base, delta, exceptions).tobytes() == tuned.tobytes()
    assert base.tobytes() == before.tobytes()


@every_dtype
@settings(max_examples=60)
@given(data=st.data())
def test_entries_and_exceptions_are_those_of_the_definition(dtype: DType, data: st.DataObject) -> None:
    shape, base, tuned = data.draw(states(dtype))
    delta, exceptions = diff_tensor(dtype, shape, base, tuned)
    assert (entries(delta), entries(exceptions)) == difference(dtype, base, tuned)
    assert (delta.shape, delta.values.dtype) == (shape, np.float32)
    assert (exceptions.shape, exceptions.values.dtype) == (shape, dtype.carrier)


@every_dtype
@settings(max_examples=30)
@given(data=st.data())
def test_elements_without_an_entry_keep_their_bits(dtype: DType, data: st.DataObject) -> None:
    shape = data.draw(shapes())
    base = data.draw(carriers(dtype, math.prod(shape)))
    # tensors that cannot be added have no additive entries
    delta = data.draw(sparse_tensors(shape=st.just(shape))) if dtype.additive else SparseTensor.empty(shape)
    exceptions = data.draw(sparse_tensors(bit_patterns(dtype), dtype.carrier, st.just(shape)))
    result = apply_tensor(dtype, base, delta, exceptions)
    untouched = np.setdiff1d(np.arange(base.size), np.union1d(delta.indices, exceptions.indices))
    assert result[untouched].tobytes() == base[untouched].tobytes()
    assert result[exceptions.indices].tobytes() == exceptions.values.tobytes()


@every_dtype
@pytest.mark.parametrize("shape", [(), (0, 3), (4,)])
def test_equal_tensors_have_an_empty_difference(dtype: DType, shape: tuple[int, ...]) -> None:
    bits = np.full(math.prod(shape), 7, dtype.carrier)
    delta, exceptions = diff_tensor(dtype, shape, bits, bits.copy())
    assert (len(delta), len(exceptions)) == (0, 0)


def near_pair(dtype: DType) -> tuple[Any, Any]:
    """Weights of usual size, and the same after a fine-tune that moves each by 1 % of the spread."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=20_000)
    return base.astype(dtype.real), (base + 0.01 * rng.normal(size=base.size)).astype(dtype.real)


@pytest.mark.parametrize(("name", "share"), [("F32", 0.01), ("F16", 0), ("BF16", 0), ("F8_E4M3", 0.01)])
def test_a_usual_fine_tune_needs_few_exceptions(name: str, share: float) -> None:
    dtype = DTYPES[name]
    base, tuned = (values.view(dtype.carrier) for values in near_pair(dtype))
    delta, exceptions = diff_tensor(dtype, base.shape, base, tuned)
    assert len(delta) > 1000
    assert len(exceptions) <= share * len(delta)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
def test_a_changed_sign_of_zero_is_an_exception(dtype: DType) -> None:
    zeros = np.array([0.0, -0.0]).astype(dtype.real).view(dtype.carrier)
    delta, exceptions = diff_tensor(dtype, (2,), zeros, zeros[::-1].copy())
    assert len(delta) == 0
    assert entries(exceptions) == {0: zeros[1], 1: zeros[0]}
