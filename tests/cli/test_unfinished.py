"""Unfinished work is continued or removed only if taskvec wrote it and all other checks passed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.building import package, tensor, write_checkpoint
from support.commands import inside, ok, refused
from support.inputs import existing, into, make_inputs, snapshot


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, which contains all kinds of inputs."""
    monkeypatch.chdir(tmp_path)
    return make_inputs(tmp_path)


MERGE = ("merge", "a.lota", "b.lota", "--base", "base", "-o", "m", "--method", "linear")
TRAIN = ("train", "base", "rows.jsonl", "-o", "x.lota")


def unfinished(kind: str, folder: Path) -> None:
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"kind": kind}))
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"half")


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no record": (into("letter.txt"), "contains files, but no record of the run that they belong to"),
    "no object": (into("run.json", b"[]"), "is not the record of a "),
    "no JSON": (into("run.json", b"{"), "is not the record of a run"),
    "somebody else's": (into("run.json", b'{"name": "mine"}'), "is not the record of a "),
    "other work": (into("run.json", b'{"kind": "demo"}'), "is not the record of a "),
    "a file": (lambda folder: folder.write_bytes(b"mine"), "is not a folder of unfinished work"),
    "a link": (lambda folder: folder.symlink_to("dir"), "is not a folder of unfinished work"),
}


@pytest.mark.parametrize("flag", ["--force", "--resume"])
@pytest.mark.parametrize(("put", "sentence"), FOREIGN.values(), ids=FOREIGN.keys())
def test_only_our_own_unfinished_work_is_removed(
    put: Callable[[Path], object], sentence: str, flag: str, work: Path
) -> None:
    put(work / "m.part")
    put(work / "x.lota.run")
    before = snapshot(work)
    for command, folder in ((MERGE, "m.part"), (TRAIN, "x.lota.run")):
        said = refused(1, *command, flag)
        assert folder in said
        assert sentence in said
    assert snapshot(work) == before


BROKEN = {
    "base": ("--base", "bse"),
    "vector": ("absent.lota",),
    "dtype": ("--dtype", "int4"),
    "size": ("--shard-size", "much"),
    "weights": ("--weights", "1"),
    "method": ("--method", "magic"),
}


@pytest.mark.parametrize("wrong", BROKEN.values(), ids=BROKEN.keys())
def test_unfinished_work_stays_where_the_command_is_refused(wrong: tuple[str, ...], work: Path) -> None:
    unfinished("merge", work / "m.part")
    before = snapshot(work)
    said = inside(*MERGE, "--force", *wrong)
    assert said.returncode in (1, 2), said
    assert snapshot(work) == before


def test_unfinished_work_stays_where_the_base_is_another(work: Path) -> None:
    unfinished("merge", work / "m.part")
    write_checkpoint(work / "other", {"w": tensor("F32", [1.0])})
    before = snapshot(work)
    refused(1, *MERGE, "--base", "other", "--force")
    assert snapshot(work) == before


def test_an_unfinished_training_stays_where_the_command_is_refused(work: Path) -> None:
    unfinished("run", work / "x.lota.run")
    before = snapshot(work)
    for wrong in (("--sparsity", "2"), ("--mask-from", "absent.lota"), ("--eval-data", "absent.jsonl")):
        inside(*TRAIN, "--force", *wrong)
        assert snapshot(work) == before
    refused(2, "train", "bse", "rows.jsonl", "-o", "x.lota", "--force")
    refused(1, *TRAIN, "--force")  # no language model
    assert snapshot(work) == before


def test_force_starts_a_merge_anew(work: Path) -> None:
    unfinished("merge", work / "m.part")
    assert "--resume continues it, --force starts over" in refused(2, *MERGE)
    ok(*MERGE, "--force")
    assert not (work / "m.part").exists()
    ok(*MERGE[:-3], "whole", *MERGE[-2:])
    files = {name: digest for name, digest in package(work / "m").items() if name != "README.md"}
    assert files.items() <= package(work / "whole").items()


def test_unfinished_work_that_is_read_is_not_removed(work: Path) -> None:
    unfinished("merge", work / "m.part")
    (work / "m.part" / "v.lota").write_bytes((work / "a.lota").read_bytes())
    unfinished("run", work / "x.lota.run")
    (work / "x.lota.run" / "mask.lota").write_bytes((work / "a.lota").read_bytes())
    before = snapshot(work)
    for flag in ("--force", "--resume"):
        assert "contains the input" in refused(2, *MERGE, "m.part/v.lota", flag)
        assert "contains the input" in refused(2, *TRAIN, "--mask-from", "x.lota.run/mask.lota", flag)
    assert snapshot(work) == before


@pytest.mark.parametrize("put", [into("letter.txt"), into("data/sql-train.jsonl"), into("merged/model.safetensors")])
def test_the_demo_leaves_a_folder_of_somebody_else_alone(put: Callable[[Path], object], tmp_path: Path) -> None:
    put(tmp_path / "demo")
    before = snapshot(tmp_path)
    assert "contains files, but no record" in refused(1, "demo", tmp_path / "demo")
    existing(tmp_path / "file")
    refused(1, "demo", tmp_path / "file")
    assert snapshot(tmp_path) == {**before, "file": b"mine"}
