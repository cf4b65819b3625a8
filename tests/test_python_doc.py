"""The programs in docs/python.md run unchanged, one after another, and use only public names."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from support.models import ROWS, perturb, write_rows
from support.paths import ROOT

import taskvec

PROGRAMS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_programs_run(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(PROGRAMS) >= 10
    shutil.copytree(llama, tmp_path / "base")
    perturb(llama, tmp_path / "tuned", dtype="float32")
    for name in ("train", "second", "test"):
        write_rows(tmp_path / f"{name}.jsonl", ROWS * 4)
    monkeypatch.chdir(tmp_path)
    for program in PROGRAMS:
        assert set(re.findall(r"\btaskvec\.(\w+)", program)) <= set(taskvec.__all__)
        exec(compile(program, "docs/python.md", "exec"), {})
    made = "tuned largest task second both ties sum forget small own best"
    assert {path.name for path in tmp_path.glob("*.lota")} == {f"{name}.lota" for name in made.split()}
    assert (tmp_path / "merged" / "README.md").exists()


def test_every_public_name_is_there_and_is_no_module_of_the_library() -> None:
    modules = {path.stem for path in (ROOT / "taskvec").iterdir()}
    for name in taskvec.__all__:
        assert getattr(taskvec, name) is not None
        assert name == "errors" or name not in modules
