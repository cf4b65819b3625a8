"""What of a tuned folder travels in a vector, and what is said of the rest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.building import package, tensor, write_checkpoint
from support.commands import ok, refused

from taskvec import TaskVector, apply, diff
from taskvec.errors import DiffError
from taskvec_formats import ModelFolder

BASE = {"w": tensor("F32", [1, 2, 3]), "n": tensor("I64", [1])}
TUNED = {"w": tensor("F32", [1, 2.5, 3]), "n": tensor("I64", [2])}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "base", BASE, files={"config.json": b"{}"})
    write_checkpoint(tmp_path / "tuned", TUNED, files={"config.json": b'{"a": 1}', "run.sh": b"#!/bin/sh"})
    return tmp_path


def test_what_is_not_carried_is_said_and_remembered(folders: Path) -> None:
    tuned = folders / "tuned"
    (tuned / "checkpoint-5").mkdir()
    (tuned / "pytorch_model.bin").write_bytes(b"x")
    (tuned / "adapter_config.json").write_bytes(b"{}")
    (tuned / "run.sh").chmod(0o755)
    os.mkfifo(tuned / "pipe")
    left_out = "adapter_config.json, checkpoint-5/, pipe, pytorch_model.bin, the permission to execute run.sh"
    path, out = folders / "x.lota", folders / "out"
    assert f"not carried: {left_out}\n" in ok("pack", folders / "base", tuned, "-o", path)
    assert f"not carried: {left_out}\n" in ok("inspect", path)
    said = ok("unpack", path, "--base", folders / "base", "-o", out)
    assert f"not carried: {left_out}\n" in said
    assert "identical to the tuned checkpoint, byte for byte, except for what is not carried\n" in said
    assert package(out).keys() == {"config.json", "model.safetensors", "run.sh"}


def test_a_folder_that_is_carried_whole_says_nothing(folders: Path) -> None:
    said = ok("pack", folders / "base", folders / "tuned", "-o", folders / "x.lota")
    assert "not carried" not in said
    assert "not_carried" not in TaskVector.open(folders / "x.lota").provenance
    said = ok("unpack", folders / "x.lota", "--base", folders / "base", "-o", folders / "out")
    assert said.endswith("the tuned checkpoint, byte for byte\n")


def test_a_sparse_vector_says_what_else_has_changed(folders: Path) -> None:
    vector = diff(ModelFolder(folders / "base"), ModelFolder(folders / "tuned"), sparsity=0.5)
    assert vector.provenance["not_carried"] == ["tensor n", "config.json", "run.sh"]


def test_what_of_the_base_is_not_written_is_said(folders: Path) -> None:
    (folders / "base" / "onnx").mkdir()
    vector = diff(ModelFolder(folders / "base"), ModelFolder(folders / "tuned"), sparsity=0.5)
    assert apply(vector, ModelFolder(folders / "base"), folders / "out").left_out == ("onnx/",)


def test_side_files_beyond_what_a_file_can_hold_are_left_out(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskvec.vectors.carried.BLOB_BYTES", 500)
    (folders / "tuned" / "log.txt").write_bytes(bytes(400))
    vector = diff(ModelFolder(folders / "base"), ModelFolder(folders / "tuned"))
    assert vector.provenance["not_carried"] == ["log.txt (400 bytes)"]
    assert [file.name for file in vector.source.files() or ()] == ["config.json", "run.sh"]


@pytest.mark.parametrize("name", [b"caf\xe9.txt", b"a\nb.txt", b"a\x1b.txt"])
def test_a_name_that_cannot_be_stored_is_refused_before_any_work(name: bytes, folders: Path) -> None:
    Path(os.fsdecode(os.fsencode(folders / "tuned") + b"/" + name)).write_bytes(b"")
    with pytest.raises(DiffError, match="rename or remove the file"):
        diff(ModelFolder(folders / "base"), ModelFolder(folders / "tuned"), progress=lambda *_: pytest.fail("work"))
    refused(1, "pack", folders / "base", folders / "tuned", "-o", folders / "x.lota")
    assert not (folders / "x.lota").exists()


def test_a_folder_whose_name_is_not_unicode_can_be_packed(folders: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(folders) + b"/caf\xe9"))
    (folders / "tuned").rename(odd)
    path = folders / "x.lota"
    diff(ModelFolder(folders / "base"), ModelFolder(odd)).save(path)
    assert TaskVector.open(path).header.tuned is not None
    ok("inspect", path)
