"""What people expect of the commands: several files, folders in place of vectors, parents, alike exit codes."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import ok, refused
from support.models import perturb

from taskvec import TaskVector, diff, merge

MAIN = "from taskvec_cli.main import main; main()"


@pytest.fixture
def pair(llama: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two vectors of one base."""
    paths = tmp_path / "first.lota", tmp_path / "second.lota"
    for seed, path in enumerate(paths, 1):
        perturb(llama, tmp_path / path.stem, dtype="float32", seed=seed)
        diff(llama, tmp_path / path.stem, 0.9).save(path)
    return paths


def test_a_missing_model_and_a_missing_vector_end_alike(llama: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone.lota"
    for command in (["verify", gone], ["inspect", gone], ["merge", gone], ["unpack", gone, "--base", llama, "-o", "x"]):
        assert refused(2, *command) == f"taskvec: {gone}: no such file\n"
    assert "no such file or folder" in refused(2, "pack", gone, llama, "-o", tmp_path / "x.lota")


def test_several_files_are_verified(pair: tuple[Path, Path], llama: Path, tmp_path: Path) -> None:
    said = ok("verify", *pair, "--base", llama)
    assert [line.split(":")[0] for line in said.splitlines()] == [str(path) for path in pair]
    reports = json.loads(ok("verify", *pair, "--json"))
    assert [report["path"] for report in reports] == [str(path) for path in pair]
    damaged = bytearray(pair[1].read_bytes())
    damaged[-1] ^= 1
    pair[1].write_bytes(damaged)
    assert "second.lota" in refused(1, "verify", *pair)


def test_fine_tunes_are_merged_without_a_recipe(pair: tuple[Path, Path], llama: Path, tmp_path: Path) -> None:
    folders = [path.with_suffix("") for path in pair]
    ok("merge", *folders, "--base", llama, "--method", "linear", "-o", tmp_path / "merged")
    packed = [tmp_path / f"{folder.name}-whole.lota" for folder in folders]
    for folder, path in zip(folders, packed, strict=True):
        ok("pack", llama, folder, "-o", path)
    ok("merge", *packed, "--base", llama, "--method", "linear", "-o", tmp_path / "expected")
    assert [path.read_bytes() for path in sorted((tmp_path / "merged").glob("*.safetensors"))] == [
        path.read_bytes() for path in sorted((tmp_path / "expected").glob("*.safetensors"))
    ]
    assert "is an input" in refused(2, "merge", *folders, "--base", llama, "-o", folders[0], "--force")
    assert "is a model folder, not a .lota file" in refused(2, "merge", *folders, "-o", tmp_path / "x.lota")


def test_parents_are_shown_as_a_tree(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = (TaskVector.open(path) for path in pair)
    merge([first, second], "linear", [1.0, 0.5]).save(tmp_path / "both.lota")
    both = TaskVector.open(tmp_path / "both.lota")
    (both - first).save(tmp_path / "minus.lota")
    lines = ok("inspect", tmp_path / "minus.lota").splitlines()
    start = lines.index("parents:")
    assert lines[start + 1 : start + 6] == [
        f"  - both.lota (weight 1.0, merge, linear, {both.digest})",
        f"    - first.lota (weight 1.0, pack, {first.digest})",
        f"    - second.lota (weight 0.5, pack, {second.digest})",
        f"  - first.lota (weight -1.0, pack, {first.digest})",
        "",
    ]


def test_the_overlap_table_fits_a_terminal(pair: tuple[Path, Path]) -> None:
    """No number is cut off at 80 columns, whatever the names."""
    long = pair[0].with_name(f"{'a-rather-long-name-' * 3}.lota")
    pair[0].rename(long)
    master, slave = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-c", MAIN, "inspect", long.name, pair[1].name],
        stdout=slave,
        stderr=subprocess.DEVNULL,
        cwd=long.parent,
        env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"},
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 1 << 16)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(master)
    assert run.wait() == 0
    lines = shown.decode().replace("\r", "").splitlines()
    table = lines[lines.index("Overlap of the masks") :]
    assert max(map(len, table)) <= 80
    assert "…" not in "".join(table)
    assert any("conflicts" in line and "cosine" in line for line in table)
