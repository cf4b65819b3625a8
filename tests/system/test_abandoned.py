"""What a killed writer leaves beside an output is removed by the next one, and what a living writer holds is not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from taskvec_formats.system.atomic import atomic_directory, atomic_file

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs file locks")


def leave(folder: Path, name: str, age: float) -> Path:
    path = folder / name
    if name.startswith(".model"):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
    else:
        path.write_bytes(b"half")
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))
    return path


def test_an_abandoned_file_is_removed_by_the_next_writer_of_that_name(tmp_path: Path) -> None:
    abandoned, other = leave(tmp_path, ".a.lota.x1.part", 3600), leave(tmp_path, ".b.lota.x1.part", 3600)
    with atomic_file(tmp_path / "a.lota") as temporary:
        temporary.write_bytes(b"whole")
    assert not abandoned.exists()
    assert other.exists()
    assert (tmp_path / "a.lota").read_bytes() == b"whole"


def test_an_abandoned_folder_is_removed(tmp_path: Path) -> None:
    abandoned = leave(tmp_path, ".model.x1.part", 3600)
    with atomic_directory(tmp_path / "model") as temporary:
        (temporary / "model.safetensors").write_bytes(b"whole")
    assert not abandoned.exists()
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == b"whole"


def test_a_file_that_was_just_made_stays(tmp_path: Path) -> None:
    fresh = leave(tmp_path, ".a.lota.x1.part", 0)
    with atomic_file(tmp_path / "a.lota") as temporary:
        temporary.write_bytes(b"whole")
    assert fresh.exists()


def test_a_file_that_another_writer_holds_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.lota"
    with atomic_file(path) as first:
        then = first.stat().st_mtime - 3600
        os.utime(first, (then, then))
        with atomic_file(path) as second:
            second.write_bytes(b"second")
        first.write_bytes(b"first")
    assert path.read_bytes() == b"first"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.lota"]
