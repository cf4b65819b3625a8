"""Tables of evaluations: each cell is what an evaluation of its own gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.commands import ok, refused
from support.live import Small, task
from support.models import ROWS, write_rows

from taskvec import evaluate, evaluate_grid, merge
from taskvec.errors import UsageError

pytestmark = pytest.mark.slow


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, Path]:
    return {
        "one": write_rows(tmp_path / "one.jsonl", ROWS[:2]),
        "two": write_rows(tmp_path / "two.jsonl", ROWS[2:]),
    }


def test_each_cell_is_an_evaluation(small: Small, sets: dict[str, Path], tmp_path: Path) -> None:
    _, base, files = small
    files = [*files, task(base.path, tmp_path / "third.lota", slice(None), seed=7)]
    metrics = ("loss", "exact_match")
    grid = evaluate_grid(base.path, sets, files, metrics=metrics, device="cpu")
    whole = merge(files).name
    assert [row.name for row in grid.rows] == ["base", "0.lota", "1.lota", "third.lota", whole]
    assert [row.method for row in grid.rows] == [None, None, None, None, "ties"]
    chosen = [[], *([file] for file in files), files]
    for row, vectors in zip(grid.rows, chosen, strict=True):
        assert [vector.name for vector in row.vectors] == [file.name for file in vectors]
        for name, data in sets.items():
            alone = evaluate(base.path, data, vectors, metrics=metrics, device="cpu")
            assert row.evaluations[name].metrics == alone.metrics
            assert row.notes == alone.notes
    lines = str(grid).splitlines()
    assert lines[0].split() == ["model", "one", "loss", "one", "exact_match", "two", "loss", "two", "exact_match"]
    assert len({len(line) for line in lines}) == 1
    assert str(grid.rows[1].evaluations["two"].metrics["loss"]) in lines[2]
    each = evaluate_grid(base.path, sets, files, each=True, metrics=metrics, device="cpu")
    assert each.rows == grid.rows[1:4]


def test_the_command_prints_the_same_table(small: Small, sets: dict[str, Path]) -> None:
    _, base, files = small
    asked = ["eval", base.path, *(f"--with={file}" for file in files), "--device", "cpu"]
    asked += [f"--data={name}={data}" for name, data in sets.items()]
    grid = evaluate_grid(base.path, sets, files, device="cpu")
    report = json.loads(ok(*asked, "--grid", "--json"))
    assert report["data"] == {name: str(data) for name, data in sets.items()}
    assert [row["with"] for row in report["variants"]] == [[], [str(files[0])], [str(files[1])], list(map(str, files))]
    for row, found in zip(grid.rows, report["variants"], strict=True):
        for name in sets:
            loss = row.evaluations[name].metrics["loss"]
            metrics = {"loss": {"value": loss.value, "standard_error": loss.standard_error}}
            assert found["results"][name]["metrics"] == metrics
    said = ok(*asked, "--grid")
    assert all(cell in said for row in grid.cells() for cell in row[1:])
    assert "one: 2 examples, two: 2 examples" in said
    assert "merged by disjoint: no two masks share a position" in said
    assert json.loads(ok(*asked, "--each", "--json"))["variants"] == report["variants"][1:3]
    assert json.loads(ok(*asked, "--json"))["variants"] == report["variants"][3:]


def test_files_of_one_name_have_their_paths_as_names(small: Small, sets: dict[str, Path], tmp_path: Path) -> None:
    _, base, files = small
    (tmp_path / "other").mkdir()
    same = shutil.copy(files[1], tmp_path / "other" / files[0].name)
    grid = evaluate_grid(base.path, {"one": sets["one"]}, [files[0], same, files[1]], each=True, device="cpu")
    assert [row.name for row in grid.rows] == [str(files[0]), str(same), "1.lota"]


def test_tables_that_cannot_be_meant_are_refused(small: Small, sets: dict[str, Path], tmp_path: Path) -> None:
    _, base, files = small
    asked = ["eval", base.path, "--with", files[0], "--data", sets["one"]]
    for more, message in (
        (["--each", "--grid"], "--grid includes --each: give one of them"),
        (["--data", sets["one"]], "two --data have the name"),
        (["--grid", "--metric", "rouge1", "--answers", tmp_path / "a"], "--answers takes one DATA, and neither"),
    ):
        assert message in refused(2, *asked, *more)
    assert "--each needs --with" in refused(2, "eval", base.path, "--data", sets["one"], "--each")
    with pytest.raises(UsageError, match="there is nothing to evaluate"):
        evaluate_grid(base.path, {}, files)
    with pytest.raises(UsageError, match="there is nothing to evaluate"):
        evaluate_grid(base.path, sets, [], each=True)
    with pytest.raises(UsageError, match="data must be a Mapping"):
        evaluate_grid(base.path, sets["one"], files)  # type: ignore[arg-type]
