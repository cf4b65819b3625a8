"""Blocks cover a tensor in whole rows; a base of another form is taken for the tuned one as a dense loop would."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.oracle import bit_patterns, carriers, rounded, shapes, value

from taskvec_formats import Form
from taskvec_formats.dtypes import DTYPES, DType
from taskvec_formats.forms import BLOCK_ELEMENTS, take_for

F32, F64, BF16, I32 = DTYPES["F32"], DTYPES["F64"], DTYPES["BF16"], DTYPES["I32"]
DIMENSION = st.integers(0, 5) | st.sampled_from([1000, 2048, 4097, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS + 1])


@given(st.lists(DIMENSION, max_size=3))
def test_blocks_are_as_many_whole_rows_as_fit(shape: list[int]) -> None:
    form = Form(F32, tuple(shape))
    assume(form.size < 1 << 32)
    blocks = list(form.blocks())
    cols = shape[-1] if len(shape) > 1 else 1
    assert form.cols == cols
    assert [start for start, _ in blocks] == [0, *(stop for _, stop in blocks[:-1])][: len(blocks)]
    assert sum(stop - start for start, stop in blocks) == form.size == math.prod(shape)
    for start, stop in blocks:
        assert stop > start
        assert start % cols == stop % cols == 0
        assert stop - start <= max(cols, BLOCK_ELEMENTS)
    for start, stop in blocks[:-1]:
        assert stop - start + cols > BLOCK_ELEMENTS


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        ((), [(0, 1)]),
        ((0,), []),
        ((0, 3), []),
        ((3, 0), []),
        ((5,), [(0, 5)]),
        ((BLOCK_ELEMENTS,), [(0, BLOCK_ELEMENTS)]),
        ((BLOCK_ELEMENTS + 1,), [(0, BLOCK_ELEMENTS), (BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1)]),
        ((2, BLOCK_ELEMENTS + 1), [(0, BLOCK_ELEMENTS + 1), (BLOCK_ELEMENTS + 1, 2 * BLOCK_ELEMENTS + 2)]),
        ((1, 1 << 40), [(0, 1 << 40)]),
        ((3, (1 << 21) - 1, 2), [(0, BLOCK_ELEMENTS), (BLOCK_ELEMENTS, 2 * BLOCK_ELEMENTS)]),
    ],
)
def test_blocks_of_some_shapes(shape: tuple[int, ...], blocks: list[tuple[int, int]]) -> None:
    if len(shape) == 3:
        blocks = [*blocks, (2 * BLOCK_ELEMENTS, 6 * ((1 << 21) - 1))]
    assert list(Form(F32, shape).blocks()) == blocks


def test_a_form_is_written_as_dtype_and_shape() -> None:
    assert [str(Form(BF16, shape)) for shape in ((), (3,), (2, 0, 3))] == ["BF16 []", "BF16 [3]", "BF16 [2, 0, 3]"]


def naive(bits: list[int], origin: Form, form: Form) -> list[int]:
    """An element at a time."""
    taken = [0] * form.size
    same = origin.dtype == form.dtype
    if len(origin.shape) != len(form.shape) or not (same or (origin.dtype.additive and form.dtype.additive)):
        return taken
    places = {index: n for n, index in enumerate(itertools.product(*map(range, origin.shape)))}
    for n, index in enumerate(itertools.product(*map(range, form.shape))):
        if index in places:
            old = bits[places[index]]
            new = old if same else rounded(form.dtype, value(origin.dtype, old))
            taken[n] = 0 if not same and math.isnan(value(form.dtype, new)) else new
    return taken


@pytest.mark.filterwarnings("ignore:invalid value")
@given(st.data(), shapes(), shapes())
def test_a_base_of_another_form_is_taken_element_by_element(
    data: st.DataObject, old: tuple[int, ...], new: tuple[int, ...]
) -> None:
    dtypes = st.sampled_from(list(DTYPES.values()))
    origin, form = Form(data.draw(dtypes), old), Form(data.draw(dtypes), new)
    if data.draw(st.booleans()):
        form = Form(origin.dtype, form.shape)
    bits = data.draw(carriers(origin.dtype, origin.size))
    taken = take_for(bits, origin, form)
    assert (taken.dtype, taken.shape) == (form.dtype.carrier, (form.size,))
    expected = naive(bits.tolist(), origin, form)
    assert taken.tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@given(data=st.data())
def test_the_same_dtype_keeps_every_bit(dtype: DType, data: st.DataObject) -> None:
    bit = data.draw(bit_patterns(dtype))
    bits = np.array([bit] * 4, dtype.carrier)
    assert take_for(bits, Form(dtype, (2, 2)), Form(dtype, (3, 1))).tolist() == [bit, bit, 0]


def test_rounding_goes_through_f32() -> None:
    # 1 + 2⁻⁸ + 2⁻³⁰: f32 drops the last part, and the tie then goes to even; rounding at once would go up
    wide = np.array([1 + 2.0**-8 + 2.0**-30]).view("<u8")
    assert take_for(wide, Form(F64, (1,)), Form(BF16, (1,))).tolist() == [0x3F80]


def test_scalars_are_taken() -> None:
    one = np.array([1.0], "<f4").view("<u4")
    assert take_for(one, Form(F32, ()), Form(BF16, ())).tolist() == [0x3F80]
    assert take_for(one, Form(F32, ()), Form(BF16, (1,))).tolist() == [0]
    assert take_for(one, Form(F32, ()), Form(I32, ())).tolist() == [0]
