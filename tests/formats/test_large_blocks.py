"""A block of more than 2^24 entries: a row is never cut, and the codecs that code numbers take no more than that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.building import Tensor, contents, write_checkpoint

from taskvec import TaskVector, apply, diff
from taskvec_formats import Change, Form, ModelFolder, SparseTensor
from taskvec_formats.blocks import CODECS, decode_block, encode_block
from taskvec_formats.codecs.numbers import MOST
from taskvec_formats.dtypes import DTYPES

pytestmark = pytest.mark.slow

SIZE = MOST + 3


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("part", ["delta", "replacements", "patch"])
def test_every_choice_of_codecs_holds_a_block_in_which_all_changes(codec: str, part: str) -> None:
    form = Form(DTYPES["F8_E4M3"], (1, SIZE))
    everywhere = np.arange(SIZE)
    bits = (everywhere % 251).astype(np.uint8)
    given = SparseTensor((SIZE,), everywhere, bits)
    base = None
    if part == "delta":
        given = given.with_values(bits.astype(np.float32))
        change = Change(given, SparseTensor.empty((SIZE,), np.uint8))
    else:
        change = Change(SparseTensor.empty((SIZE,)), given)
        base = bits + np.uint8(1) if part == "patch" else None
    block, data = encode_block(form, change, base, codec)
    assert block is not None
    found = decode_block(form, block, (0, SIZE), memoryview(data), base)
    read = found.delta if part == "delta" else found.replacements
    assert np.array_equal(read.indices, everywhere)
    assert np.array_equal(read.values.view(given.values.dtype), given.values)


def test_a_pair_of_checkpoints_that_differs_everywhere_in_such_a_row(tmp_path: Path) -> None:
    dtype = DTYPES["F8_E5M2"]
    states = [
        write_checkpoint(tmp_path / name, {"w": Tensor(dtype, (1, SIZE), np.full(SIZE, bits, np.uint8))})
        for name, bits in (("base", 1), ("tuned", 2))
    ]
    diff(*states).save(tmp_path / "x.lota", codec="fast")
    assert apply(TaskVector.open(tmp_path / "x.lota"), states[0], tmp_path / "out").exact
    assert contents(ModelFolder(tmp_path / "out")) == contents(states[1])
