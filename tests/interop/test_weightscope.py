"""Patches of weightscope: a file that it wrote, and damaged ones."""

from __future__ import annotations

import json
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from safetensors.numpy import load_file, save_file
from support.commands import ok, refused
from support.paths import ROOT

import taskvec
from taskvec import interop
from taskvec.errors import BaseMismatchError, ConversionError, UsageError
from taskvec_formats import ModelFolder

GOLDEN = ROOT / "tests" / "golden" / "weightscope"
PATCH, BASE = GOLDEN / "golden.wsp", GOLDEN / "base.safetensors"


@pytest.mark.parametrize("kind", ["vector", "patch"])
def test_the_result_is_what_weightscope_restores(kind: Any, tmp_path: Path) -> None:
    vector = interop.from_wsp(PATCH, BASE, kind=kind)
    vector.save(tmp_path / "v.lota")
    assert vector.provenance["threshold"] == 1e-6
    assert taskvec.apply(tmp_path / "v.lota", BASE, tmp_path / "out").exact
    assert ModelFolder(tmp_path / "out").digests() == ModelFolder(GOLDEN / "restored.safetensors").digests()


def written(path: Path, header: dict[str, Any], payload: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(b"WSP2" + struct.pack("<I", len(text)) + text + zstandard.compress(payload))
    return path


def content(path: Path = PATCH) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[4:8], "little")
    return json.loads(data[8 : 8 + length]), zstandard.decompress(data[8 + length :])


def record(header: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in header["tensors"] if each["name"] == name)


def changed(tensor: str, /, **fields: Any) -> Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]:
    """Change the description of a tensor."""

    def change(header: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
        record(header, tensor).update(fields)
        return header, payload

    return change


def with_header(**fields: Any) -> Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]:
    return lambda header, payload: ({**header, **fields}, payload)


def with_position(place: int, value: int) -> Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]:
    def change(header: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
        at = record(header, "f32")["blob_offset"] + 4 * place
        return header, payload[:at] + struct.pack("<I", value) + payload[at + 4 :]

    return change


DEFECTS = {
    "version": (with_header(version="0.1"), "expected version 0.2, found '0.1'"),
    "no list": (with_header(tensors=None), "lacks threshold, tensors or only_in_a"),
    "names": (with_header(only_in_a=[3]), "only_in_a is not a list of names"),
    "twice": (with_header(only_in_a=["f32"]), "tensor 'f32' is listed twice"),
    "no object": (with_header(tensors=[3]), "expected the description of a tensor, found 3"),
    "dtype": (changed("f32", dtype="float4"), "tensor 'f32' has dtype 'float4'"),
    "shape": (changed("f32", shape=[-1]), r"tensor 'f32' has the shape \[-1\]"),
    "huge": (changed("f32", shape=[1 << 40, 1 << 40]), "fewer than 2\\^48 are read"),
    "kind": (changed("f32", kind="xor"), "tensor 'f32' is of the unknown kind 'xor'"),
    "count": (changed("f32", n_changed=10**9), "has 1000000000 positions of 4 bytes in"),
    "width": (changed("f32", index_width=2), "positions of 2 bytes"),
    "digest": (changed("f32", base_sha256="x"), "has no SHA-256 of the base"),
    "offset": (changed("f32", blob_offset=0), "bytes at 0, expected"),
    "size": (changed("new", shape=[1 << 20, 1 << 20]), "expected 4398046511104 at"),
    "payload": (changed("new", shape=[1 << 20, 1 << 20], blob_size=1 << 42), "at most 268\\d+ are read for this base"),
    "control": (changed("f32", name="a\nb"), "control character"),
    "longer": (lambda header, payload: (header, payload + bytes(1 << 20)), "bytes of payload, but it has more"),
    "shorter": (lambda header, payload: (header, payload[:-1]), "bytes of payload, but it has only"),
    "order": (with_position(0, 30), "the positions of tensor 'f32' are not increasing or out of range"),
    "range": (with_position(-1 + 11, 72), "the positions of tensor 'f32' are not increasing or out of range"),
}


@pytest.mark.parametrize(("damage", "message"), DEFECTS.values(), ids=DEFECTS.keys())
def test_a_damaged_patch_is_refused(damage: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "bad.wsp", *damage(*content()))
    with pytest.raises(ConversionError, match=message):
        interop.from_wsp(path, BASE)


def test_a_payload_that_grows_is_not_decompressed(tmp_path: Path) -> None:
    header, payload = content()
    path = written(tmp_path / "bomb.wsp", header, payload + bytes(1 << 28))
    assert path.stat().st_size < 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConversionError, match="but it has more"):
        interop.from_wsp(path, BASE)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize("length", [0, 3, 7, 8, 500, -1])
def test_a_file_that_ends_early_is_refused(length: int, tmp_path: Path) -> None:
    (tmp_path / "short.wsp").write_bytes(PATCH.read_bytes()[:length])
    with pytest.raises(ConversionError):
        interop.from_wsp(tmp_path / "short.wsp", BASE)


def test_another_base_is_refused(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "base.safetensors")
    for name, change, message in (
        ("f32", {"f32": tensors["f32"] + 1}, "tensor 'f32' has other values"),
        ("same", {"same": tensors["same"] + 1}, "tensor 'same' has other values"),
        ("shape", {"f32": tensors["f32"].reshape(-1)}, r"tensor 'f32' is F32 \[72\], not F32 \[8, 9\]"),
        ("gone", {"gone": None}, "it has no tensor 'gone'"),
        ("lacks", {"f32": None}, "it has no tensor 'f32'"),
    ):
        other = {key: value for key, value in (tensors | change).items() if value is not None}
        save_file(other, tmp_path / f"{name}.safetensors")
        with pytest.raises(BaseMismatchError, match=message):
            interop.from_wsp(PATCH, tmp_path / f"{name}.safetensors")


def test_weights_of_a_narrower_dtype_are_converted_and_wider_ones_refused(tmp_path: Path) -> None:
    header, _ = content()
    for name, dtype, width in (("f32", "float16", 2), ("f16", "float32", 4)):
        own = record(header, name)
        own["blob_offset"], own["dtype"] = 0, dtype
        own["blob_size"] = own["n_changed"] * (4 + width)
        values = np.full(own["n_changed"], 1.5, f"<f{width}").tobytes()
        alone = {**header, "tensors": [own], "only_in_a": []}
        path = written(tmp_path / f"{name}.wsp", alone, np.arange(own["n_changed"], dtype="<u4").tobytes() + values)
        if name == "f16":
            with pytest.raises(ConversionError, match="has weights of F32 for tensor 'f16', which is F16 in base"):
                interop.from_wsp(path, BASE)
        else:
            interop.from_wsp(path, BASE).save(tmp_path / "v.lota")
            taskvec.apply(tmp_path / "v.lota", BASE, tmp_path / "out")
            found = ModelFolder(tmp_path / "out").bits("f32").view(np.float32)
            assert (found[: own["n_changed"]] == 1.5).all()


def test_the_command(tmp_path: Path) -> None:
    said = ok("convert", PATCH, "--base", BASE, "-o", tmp_path / "v.lota")
    assert said.splitlines()[1:] == [
        "tensors added: 1, removed: 1; such a vector cannot be merged",
        f"changes up to 1e-06 are not in {PATCH}",
    ]
    report = json.loads(ok("convert", PATCH, "--base", BASE, "-o", tmp_path / "v.lota", "--force", "--json"))
    assert report["threshold"] == 1e-6
    missing = tmp_path / "missing.wsp"
    assert "missing.wsp: no such file" in refused(2, "convert", missing, "--base", BASE, "-o", tmp_path / "x.lota")
    with pytest.raises(ConversionError, match="cannot be read"):
        interop.from_wsp(missing, BASE)
    with pytest.raises(UsageError, match="is an input"):
        interop.from_wsp(PATCH, BASE).save(PATCH, force=True)
