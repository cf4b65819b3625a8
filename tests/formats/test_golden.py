"""The golden files: read as ever, written as ever, refused as ever (tests/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from golden.make import OTHERS, PAIRS, write_all
from support.lota_files import DEFECTS, Dense, Parts, applied, base_bits, read
from support.paths import GOLDEN

from taskvec_formats import LotaReader, ModelFolder, SparseTensor, errors
from taskvec_formats.blocks import touched_digest
from taskvec_formats.codecs import POSITION_CODECS, VALUE_CODECS
from taskvec_formats.container import SafetensorsFile
from taskvec_formats.dtypes import DTYPES

NAMES = [*PAIRS, *OTHERS]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    write_all(folder)
    return folder


def base_of(name: str) -> Path | None:
    return GOLDEN / "valid" / f"{name}.base.safetensors" if name in PAIRS else None


@pytest.mark.parametrize("part", ["valid", "invalid"])
def test_what_is_written_today_is_what_was_written_byte_for_byte(part: str, written: Path) -> None:
    golden, today = ({path.name: path.read_bytes() for path in (at / part).iterdir()} for at in (GOLDEN, written))
    assert sorted(golden) == sorted(today)
    assert [name for name in golden if golden[name] != today[name]] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_valid_file_is_read_as_described(name: str) -> None:
    path = GOLDEN / "valid" / f"{name}.lota"
    LotaReader(path).verify()
    assert read(path, base_of(name)) == json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PAIRS)
def test_a_valid_file_gives_what_its_digests_say(name: str) -> None:
    base = base_of(name)
    assert base is not None
    reader = LotaReader(GOLDEN / "valid" / f"{name}.lota")
    assert ModelFolder(base).fingerprint == reader.header.base.fingerprint
    file = SafetensorsFile(base)
    held = {name: Dense(info.form, file.bits(name)) for name, info in file.tensors.items()}
    for spec in reader.specs.values():
        before = base_bits(spec, held)
        for block, (start, stop) in zip(spec.blocks, spec.form.blocks(), strict=True):
            change = reader.change(spec.name, start, stop, before)
            assert (block is None) == (len(change.touched()) == 0)
            if block:
                old, new = before[start:stop], applied(spec.dtype, before[start:stop], change)
                touched = change.touched()
                assert block.before == touched_digest(spec, start, old[touched])
                assert block.after == touched_digest(spec, start, new[touched])


def test_the_valid_files_hold_every_codec_and_every_dtype_in_every_kind() -> None:
    codecs, dtypes = set(), set()
    for name in NAMES:
        parts = Parts.of(GOLDEN / "valid" / f"{name}.lota")
        for tensor in parts.index["tensors"]:
            dtypes.add((parts.description["kind"], tensor["dtype"]))
            for block in filter(None, tensor["blocks"]):
                codecs |= {codec for part in filter(None, block[3:]) for codec in (part[1], part[3])}
    assert codecs == {*POSITION_CODECS, *VALUE_CODECS}
    assert {name for kind, name in dtypes if kind == "patch"} == set(DTYPES)
    assert {name for kind, name in dtypes if kind == "vector"} >= {d.name for d in DTYPES.values() if d.additive}


def test_several_blocks_are_several() -> None:
    for kind in ("vector", "patch"):
        spec = LotaReader(GOLDEN / "valid" / f"{kind}-blocks.lota").specs["w"]
        assert [block is not None for block in spec.blocks] == [True, False, True, True]


def test_explicit_zeros_keep_their_signs() -> None:
    delta: SparseTensor = LotaReader(GOLDEN / "valid" / "vector-merged.lota").change("a").delta
    assert delta.values.view("<u4").tolist() == [0, 0x80000000, 0x3F000000]
    assert np.array_equal(delta.values, [0, 0, 0.5])


def test_every_invalid_file_has_its_error() -> None:
    listed = json.loads((GOLDEN / "invalid" / "errors.json").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(DEFECTS) == sorted(path.stem for path in (GOLDEN / "invalid").glob("*.lota"))


@pytest.mark.parametrize("name", DEFECTS)
def test_an_invalid_file_is_refused_with_its_error(name: str) -> None:
    listed = json.loads((GOLDEN / "invalid" / "errors.json").read_text(encoding="utf-8"))
    path = GOLDEN / "invalid" / f"{name}.lota"
    with pytest.raises(getattr(errors, listed[name]), match=str(path)) as caught:
        LotaReader(path).verify()
    assert caught.type.__name__ == listed[name]
