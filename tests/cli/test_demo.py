"""The data of the demo, and the demo itself on a base of a few thousand weights."""

from __future__ import annotations

import json
import random
import re
import shutil
import sqlite3
from pathlib import Path

import pytest

from taskvec import TaskVector
from taskvec.data.examples import read_examples
from taskvec.demo.run import run
from taskvec.demo.tasks import TASKS, maths, sql, write_task
from taskvec_formats import ModelFolder

pytestmark = pytest.mark.slow


def test_every_query_runs_on_the_table_of_its_question() -> None:
    dice = random.Random(0)
    for _ in range(200):
        item = sql(dice)
        table = re.match(r"Table (\w+)\((\w+), (\w+), (\w+)\)", item["prompt"])
        assert table
        with sqlite3.connect(":memory:") as database:
            database.execute(f"CREATE TABLE {table[1]} ({table[2]} TEXT, {table[3]} TEXT, {table[4]} NUMBER)")
            database.execute(item["completion"])


def test_every_equation_is_right() -> None:
    dice = random.Random(0)
    for _ in range(200):
        equation, answer = maths(dice)["completion"].split("\n#### ")
        left, sign, right, result = re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+)", equation).groups()  # type: ignore[union-attr]
        a, b = int(left), int(right)
        assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] == int(result) == int(answer)


@pytest.mark.parametrize("task", TASKS)
def test_held_out_items_are_not_trained_on(task: str, tmp_path: Path) -> None:
    train, test = write_task(task, tmp_path, 300, 30)
    prompts = [{example.messages[0]["content"] for example in read_examples(path)} for path in (train, test)]
    assert [len(prompts[0]), len(prompts[1])] == [300, 30]
    assert not prompts[0] & prompts[1]
    again = write_task(task, tmp_path / "again", 300, 30)
    assert [path.read_bytes() for path in again] == [train.read_bytes(), test.read_bytes()]


def test_the_demo_runs_and_reuses_what_is_there(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(llama, folder / "base")
    first = run(folder)
    assert set(first.scores) == {"base", "sql", "maths", "merged"}
    assert all(set(row) == {"sql", "maths"} for row in first.scores.values())
    assert first.picture.read_bytes().startswith(b"\x89PNG")
    assert len(first.samples) == 2
    merged, base = TaskVector.open(folder / "merged.lota"), ModelFolder(folder / "base")
    assert merged.base.fingerprint == base.fingerprint
    assert list(ModelFolder(folder / "merged").tensors) == list(base.tensors)

    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if "data" not in path.parts}
    assert run(folder) == first
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

    # a missing ticket is trained again, and the files that depend on it are written again
    (folder / "sql.lota").unlink()
    assert run(folder).scores == first.scores
    assert (folder / "merged.lota").stat().st_mtime_ns > kept[folder / "merged.lota"]
    assert json.loads((folder / "scores.json").read_text())["scores"]
