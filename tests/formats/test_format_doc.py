"""The worked example of docs/format.md is what is written, byte for byte."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from support.paths import ROOT

from taskvec_formats import Change, Form, Header, Identity, LotaReader, LotaWriter, SparseTensor, TensorSpec
from taskvec_formats.blocks import encode_block, touched_digest
from taskvec_formats.dtypes import DTYPES
from taskvec_formats.header import Block

DOCUMENT = ROOT / "docs" / "format.md"


def write_example(path: Path) -> None:
    """Base and tuned are one tensor `w`, F32 [2, 3]; elements 1 and 5 change from 1 to 1.5 and from −2 to −2.25."""
    base = np.array([0, 1, 2, 0, -1, -2], np.float32)
    delta = SparseTensor((6,), np.array([1, 5]), np.array([0.5, -0.25], np.float32))
    tuned = base.copy()
    tuned[[1, 5]] += delta.values
    form = Form(DTYPES["F32"], (2, 3))
    change = Change(delta, SparseTensor.empty((6,), np.uint32))
    block, data = encode_block(form, change, codec="plain")
    assert block is not None
    spec = TensorSpec.like("w", form)
    before, after = (touched_digest(spec, 0, bits.view(np.uint32)[[1, 5]]) for bits in (base, tuned))
    header = Header("vector", Identity("base", "0" * 64), None, tensors=(), provenance={"made_by": "hand"})
    with LotaWriter(path, header) as writer:
        writer.add(spec, [(Block(block.digest, block.delta, None, before, after), data)])


def dump(data: bytes) -> str:
    lines = []
    for start in range(0, len(data), 16):
        row = data[start : start + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{start:04x}  {row.hex(' '):<47}  {text}".rstrip())
    return "\n".join(lines)


def test_the_worked_example_is_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "example.lota"
    write_example(path)
    found = re.search(r"```hex\n(.*?)\n```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    assert found[1] == dump(path.read_bytes())
    change = LotaReader(path).change("w")
    assert change.delta.indices.tolist() == [1, 5]
    assert change.delta.values.tolist() == [0.5, -0.25]
