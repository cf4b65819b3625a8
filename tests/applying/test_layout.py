"""Which files a program finds in a finished folder, compared with what a vector says."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
from support.attacks.files import BASE, EVIL, TUNED
from support.building import contents, write_checkpoint, write_shard

from taskvec import TaskVector, apply, diff
from taskvec.applying.layout import check_index
from taskvec.applying.shards import Shard
from taskvec.errors import ResultError, SizeError
from taskvec_formats import Form, ModelFolder
from taskvec_formats.dtypes import DTYPES
from taskvec_formats.errors import CheckpointError, HeaderError, NotSafetensorsError
from taskvec_formats.file_names import INDEX, SINGLE, is_weights

W = Shard(b"", {"w": Form(DTYPES["F32"], (2,))})
X = Shard(b"", {"x": Form(DTYPES["F32"], (2,))})


def index_of(**places: str) -> dict[str, bytes | Path]:
    return {INDEX: json.dumps({"weight_map": places}).encode()}


@pytest.mark.parametrize(
    ("shards", "files"),
    [
        ({SINGLE: W}, {}),
        ({SINGLE: W}, index_of(w=SINGLE)),
        ({"other.safetensors": W}, {}),
        ({"a.safetensors": W, "b.safetensors": X}, {}),
        ({"a.safetensors": W, "b.safetensors": X}, index_of(w="a.safetensors", x="b.safetensors")),
    ],
)
def test_shards_that_a_program_finds_are_accepted(shards: dict[str, Shard], files: dict[str, bytes | Path]) -> None:
    check_index(shards, files, "here")


@pytest.mark.parametrize(
    ("shards", "files", "message"),
    [
        ({SINGLE: W, "b.safetensors": X}, {}, "the shard 'b.safetensors' is not found by a program"),
        ({SINGLE: W, "b.safetensors": X}, index_of(w=SINGLE, x="b.safetensors"), "beside an index of other shards"),
        ({SINGLE: W}, index_of(w="b.safetensors"), "names the shard 'b.safetensors', which is not in the folder"),
        ({SINGLE: W}, index_of(w="../b.safetensors"), "which is not in the folder"),
        ({SINGLE: W}, index_of(y=SINGLE), "places tensor 'y' in 'model.safetensors', which does not contain it"),
        ({"a.safetensors": W, "b.safetensors": X}, index_of(w="a.safetensors"), "'b.safetensors' is not found"),
        ({SINGLE: W}, {INDEX: b"[]"}, "is not a shard index"),
        ({SINGLE: W}, {INDEX: b'{"weight_map": {}}'}, "is not a shard index"),
    ],
)
def test_shards_that_a_program_would_not_find_are_refused(
    shards: dict[str, Shard], files: dict[str, bytes | Path], message: str
) -> None:
    with pytest.raises(HeaderError, match=message):
        check_index(shards, files, "here")


@pytest.mark.parametrize(
    "name",
    [
        "x.BIN",
        "Model.SafeTensors",
        "a.safetensors.index.json",
        "model.safetensors.index.fp16.json",
        "Adapter_Config.json",
    ],
)
def test_weights_are_told_by_their_names(name: str) -> None:
    assert is_weights(name)


@pytest.mark.parametrize("name", [INDEX, "config.json", "tokenizer.model", "x.index.json", "safetensors", "a.bin.txt"])
def test_side_files_are_told_by_their_names(name: str) -> None:
    assert not is_weights(name)


def test_a_model_beside_the_index_of_another_is_no_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", TUNED, 2)
    write_shard(tmp_path / "m" / SINGLE, EVIL)
    with pytest.raises(CheckpointError, match="remove one of them"):
        ModelFolder(tmp_path / "m")


def test_a_result_far_larger_than_its_base_is_written_when_it_is_allowed(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", BASE)
    tuned = write_checkpoint(tmp_path / "tuned", TUNED)
    vector = diff(base, tuned)
    with pytest.raises(SizeError, match=r"makes a model of \d+ bytes from base, which has \d+; the limit is 10 bytes"):
        apply(vector, base, tmp_path / "out", max_bytes=10)
    assert not (tmp_path / "out").exists()
    apply(vector, base, tmp_path / "out", max_bytes=1_000)
    assert contents(ModelFolder(tmp_path / "out")) == contents(tuned)


def test_the_finished_folder_is_what_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program, or a file system that takes two names for one, alters it before it gets its name."""
    base = write_checkpoint(tmp_path / "base", BASE)
    vector = diff(base, write_checkpoint(tmp_path / "tuned", TUNED, files={"config.json": b"{}"}))

    def spoil(files: object, folder: Path) -> None:
        write_shard(folder / SINGLE, {"w": EVIL["w"]})

    monkeypatch.setattr(import_module("taskvec.applying.apply"), "_write_files", spoil)
    with pytest.raises(ResultError, match=r"lacks a file|has tensor 'x' as None, not as F32 \[2\]"):
        apply(vector, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["apply", "save", "verify", "overlap"])
def test_a_file_that_is_truncated_while_it_is_read_ends_in_an_error(command: str, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", BASE)
    tuned = write_checkpoint(tmp_path / "tuned", TUNED)
    diff(base, tuned).save(tmp_path / "x.lota")
    vector = TaskVector.open(tmp_path / "x.lota")
    cut = {"apply": base.shards[0].path, "save": tuned.shards[0].path}.get(command, tmp_path / "x.lota")
    fresh = diff(base, tuned)
    with open(cut, "r+b") as file:
        file.truncate(cut.stat().st_size - 12)
    acts = {
        "apply": lambda: apply(vector, base, tmp_path / "out"),
        "save": lambda: fresh.save(tmp_path / "y.lota"),
        "verify": vector.source.reader.verify,  # type: ignore[attr-defined]
        "overlap": lambda: [vector[name] for name in vector],
    }
    with pytest.raises(NotSafetensorsError, match=r"ends at byte \d+: it was cut off while it was read"):
        acts[command]()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "y.lota").exists()
