"""The container: the safetensors library reads what encode_header writes; what it lets pass is refused here."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from support.building import Tensor, tensor, write_shard

from taskvec_formats import Form
from taskvec_formats.container import SafetensorsFile, TensorInfo, encode_header, parse_header, strict_json
from taskvec_formats.dtypes import DTYPES
from taskvec_formats.errors import HeaderError, NotSafetensorsError


def raw_file(path: Path, header: str, data: bytes = b"") -> Path:
    text = header.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_every_dtype_reads_back_and_is_accepted_by_safetensors(dtype: Any, tmp_path: Path) -> None:
    bits = np.arange(6, dtype=dtype.carrier)
    path = write_shard(tmp_path / "a", {"w": Tensor(dtype, (2, 3), bits)})
    with safe_open(path, "np") as opened:
        assert opened.get_slice("w").get_dtype() == dtype.name
        assert opened.get_slice("w").get_shape() == [2, 3]
    file = SafetensorsFile(path)
    assert file.bits("w").dtype == dtype.carrier
    assert file.bits("w").tolist() == bits.tolist()
    assert bytes(file.bytes("w")) == bits.tobytes()


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"a": 'quotes " and \\ and \n', "é": "漢字"}])
@pytest.mark.parametrize("names", [[], ["w"], ["b", "a", "ü/漢", 'q"\\', "\u2028"]])
def test_names_and_metadata_survive_and_data_begin_on_a_multiple_of_8(
    names: list[str], metadata: dict[str, str], tmp_path: Path
) -> None:
    path = write_shard(tmp_path / "a", {name: tensor("U8", [i]) for i, name in enumerate(names)}, metadata)
    with safe_open(path, "np") as opened:
        assert set(opened.keys()) == set(names)
        assert (opened.metadata() or {}) == metadata
    file = SafetensorsFile(path)
    assert (list(file.tensors), file.metadata) == (names, metadata)
    assert [file.bits(name).tolist() for name in names] == [[i] for i in range(len(names))]
    assert len(file.header) % 8 == 0
    assert path.read_bytes().startswith(file.header)


def test_scalars_and_empty_tensors_have_their_range(tmp_path: Path) -> None:
    tensors = {"scalar": tensor("F32", 2.0), "empty": tensor("F32", np.zeros((0, 3))), "last": tensor("U8", [9])}
    file = SafetensorsFile(write_shard(tmp_path / "a", tensors))
    start = len(file.header)
    assert file.tensors == {
        "scalar": TensorInfo(DTYPES["F32"], (), start, start + 4),
        "empty": TensorInfo(DTYPES["F32"], (0, 3), start + 4, start + 4),
        "last": TensorInfo(DTYPES["U8"], (1,), start + 4, start + 5),
    }
    assert file.bits("empty").tolist() == []


def test_files_of_the_safetensors_library_are_read(tmp_path: Path) -> None:
    arrays = {"b": np.arange(3.0), "a": np.arange(4, dtype=np.int8)}
    save_file(arrays, tmp_path / "a")
    file = SafetensorsFile(tmp_path / "a")
    assert {name: file.bytes(name).tobytes() for name in file.tensors} == {n: a.tobytes() for n, a in arrays.items()}


def test_tensors_that_were_read_cannot_be_written(tmp_path: Path) -> None:
    file = SafetensorsFile(write_shard(tmp_path / "a", {"w": tensor("U8", [1])}))
    with pytest.raises(ValueError, match="read-only"):
        file.bits("w")[0] = 2


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 7, struct.pack("<Q", 1 << 62) + b"{}", b"PK\3\4 not a tensor file", struct.pack("<Q", 2) + b"{}x"],
    ids=["empty", "short", "huge header", "other format", "bytes after the data"],
)
def test_other_files_are_no_safetensors(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(NotSafetensorsError, match=str(path)):
        SafetensorsFile(path)


def test_a_path_without_a_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(NotSafetensorsError, match=str(path)):
            SafetensorsFile(path)


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    path = raw_file(tmp_path / "a", f'{{"w":{entry},"w":{entry}}}', b"x")
    with pytest.raises(HeaderError, match=f"{path}.*'w' occurs twice"):
        SafetensorsFile(path)


def test_a_dtype_of_safetensors_that_is_not_supported_is_named(tmp_path: Path) -> None:
    header = encode_header({"w": ("F4", (2,), 1)}, {})
    (tmp_path / "a").write_bytes(header + b"x")
    with pytest.raises(HeaderError, match="'w' has dtype 'F4', which is not supported"):
        SafetensorsFile(tmp_path / "a")


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"a":1,}', '{"a":1,"a":1}', '{"b":{"a":1,"a":2}}', '{"a":NaN}', "-Infinity", "[" * 100_000, b"\xff"],
    ids=lambda text: repr(text[:20]),
)
def test_what_is_not_strict_json_is_refused(text: str | bytes) -> None:
    with pytest.raises(HeaderError):
        strict_json(text)


def test_strict_json_is_json() -> None:
    value = {"a": [1, 2.5, None, True, {"a": "é"}]}
    assert strict_json(json.dumps(value)) == value


def test_a_header_alone_says_what_its_file_says(tmp_path: Path) -> None:
    tensors = {"b": tensor("F32", [[1, 2]]), "a": tensor("BF16", 1.0), "e": tensor("I64", [])}
    file = SafetensorsFile(write_shard(tmp_path / "a", tensors, {"format": "pt"}))
    assert parse_header(file.header) == (file.metadata, file.tensors)
    assert file.tensors["b"].form == Form(DTYPES["F32"], (1, 2))


def with_prefix(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def entry(**fields: Any) -> bytes:
    """A header of one tensor of one byte, but for some fields; None for none."""
    whole = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]} | fields
    return with_prefix(json.dumps({"w": {key: value for key, value in whole.items() if value is not None}}))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "length of the header"),
        (b"\0" * 7, "length of the header"),
        (with_prefix("{}")[:-1], "length of the header"),
        (with_prefix("{}") + b" ", "length of the header"),
        (with_prefix("[]"), "not an object of tensors"),
        (with_prefix("1"), "not an object of tensors"),
        (with_prefix("{"), "not valid JSON"),
        (with_prefix('{"__metadata__": {"a": 1}}'), "with string metadata"),
        (with_prefix('{"__metadata__": ["a"]}'), "with string metadata"),
        (with_prefix('{"w": 1}'), "tensor 'w': expected an object with .*, found 1$"),
        (entry(shape=None), "tensor 'w': expected an object with"),
        (entry(surprise=1), "tensor 'w': expected an object with"),
        (entry(dtype="F4"), "tensor 'w' has dtype 'F4'"),
        (entry(dtype=["U8"]), "tensor 'w' has dtype"),
        (entry(shape=1), "tensor 'w': expected a list of sizes"),
        (entry(shape=[-1]), "tensor 'w': expected a list of sizes"),
        (entry(shape=[True]), "tensor 'w': expected a list of sizes"),
        (entry(data_offsets=[0.0, 1]), "tensor 'w': expected a list of sizes"),
        (entry(data_offsets=[0]), r"tensor 'w' of U8 \[1\] has data_offsets \[0\], which do not match its size"),
        (entry(data_offsets=[1, 0]), "tensor 'w' of"),
        (entry(shape=[2]), r"tensor 'w' of U8 \[2\] has data_offsets"),
        (entry(shape=[1 << 40, 1 << 40]), "tensor 'w' has"),
        (entry(shape=[1 << 47, 1 << 47, 0], data_offsets=[0, 0]), "tensor 'w' has"),
        (entry(data_offsets=[1, 2]), "tensor 'w' begins at byte"),
    ],
)
def test_a_header_that_describes_no_file_is_refused(header: bytes, message: str) -> None:
    with pytest.raises(HeaderError, match=message):
        parse_header(header)


def test_tensors_that_overlap_or_leave_a_gap_are_refused() -> None:
    for first in ([0, 1], [2, 3]):
        one, two = ({"dtype": "U8", "shape": [1], "data_offsets": offsets} for offsets in ([0, 1], first))
        with pytest.raises(HeaderError, match=r"begins at byte \d+, expected byte \d+"):
            parse_header(with_prefix(json.dumps({"a": one, "b": two})))


def test_a_file_that_is_changed_after_it_was_opened_is_not_read_on(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode_header({"w": ("U8", (4,), 4)}, {}) + b"abcd")
    file = SafetensorsFile(path)
    assert bytes(file.bytes("w")) == b"abcd"
    with open(path, "r+b") as other:
        other.seek(-4, os.SEEK_END)
        other.write(b"ABCD")
    os.utime(path, ns=(0, 0))
    with pytest.raises(NotSafetensorsError, match=r"x\.safetensors was changed while it was read"):
        file.bytes("w")


def test_a_file_that_is_replaced_is_read_as_it_was(tmp_path: Path) -> None:
    path, other = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    for each, content in ((path, b"abcd"), (other, b"ABCD")):
        each.write_bytes(encode_header({"w": ("U8", (4,), 4)}, {}) + content)
    file = SafetensorsFile(path)
    other.replace(path)
    assert bytes(file.bytes("w")) == b"abcd"
