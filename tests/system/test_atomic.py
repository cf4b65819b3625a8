"""An output appears under its name complete, or not at all, and nothing else stays behind."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from taskvec_formats.system import atomic
from taskvec_formats.system.atomic import atomic_directory, atomic_file


class StopError(Exception):
    """Raised inside the block."""


def write_file(path: Path, text: str, error: type[Exception] | None = None) -> None:
    with atomic_file(path) as temporary:
        assert temporary.parent.samefile(path.parent)
        temporary.write_text(text)
        if error:
            raise error


def write_folder(path: Path, text: str, error: type[Exception] | None = None) -> None:
    with atomic_directory(path) as temporary:
        assert temporary.parent.samefile(path.parent)
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text(text)
        if error:
            raise error


def text_of(path: Path) -> str:
    return (path / "inner" / "file" if path.is_dir() else path).read_text()


Write = Callable[..., None]
both = pytest.mark.parametrize("write", [write_file, write_folder])


@both
def test_the_output_appears_with_its_parents(write: Write, tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "out", "new")
    assert text_of(tmp_path / "a" / "b" / "out") == "new"
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]


@both
def test_an_earlier_output_is_replaced(write: Write, tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    write(tmp_path / "out", "new")
    assert text_of(tmp_path / "out") == "new"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_nothing_of_an_earlier_folder_stays(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", "old")
    (tmp_path / "out" / "more").touch()
    write_folder(tmp_path / "out", "new")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["inner"]


@pytest.mark.parametrize("kind", ["file", "link to a folder", "link to nothing"])
@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two"])
def test_a_folder_replaces_what_has_its_name_and_not_what_a_link_points_to(
    exchange: bool, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    (tmp_path / "elsewhere").mkdir()
    if kind == "file":
        (tmp_path / "out").write_text("old")
    elif kind == "link to nothing":
        (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    else:
        (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    write_folder(tmp_path / "out", "new")
    assert text_of(tmp_path / "out") == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


@both
@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
def test_on_an_error_nothing_appears(write: Write, error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error):
        write(tmp_path / "out", "new", error)
    assert list(tmp_path.iterdir()) == []


@both
def test_on_an_error_an_earlier_output_stays_as_it_was(write: Write, tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(StopError):
        write(tmp_path / "out", "new", StopError)
    assert text_of(tmp_path / "out") == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can")
def test_an_earlier_folder_is_exchanged_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks, or is killed, in between sees the one or the other."""
    write_folder(tmp_path / "out", "old")
    monkeypatch.setattr(os, "rename", None)
    write_folder(tmp_path / "out", "new")
    assert text_of(tmp_path / "out") == "new"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_folder_is_replaced_in_two_steps_where_one_is_not_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    write_folder(tmp_path / "out", "old")
    write_folder(tmp_path / "out", "new")
    assert text_of(tmp_path / "out") == "new"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_an_output_that_cannot_be_finished_leaves_the_earlier_one(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", "old")
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "out") as temporary:
        shutil.rmtree(temporary)
    assert text_of(tmp_path / "out") == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_modes_are_those_that_the_umask_gives(umask: int, tmp_path: Path) -> None:
    write_file(tmp_path / "file", "")
    write_folder(tmp_path / "folder", "")
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "file", tmp_path / "folder")]
    assert modes == [0o666 & ~umask, 0o777 & ~umask]
    assert os.umask(umask) == umask


@both
def test_a_bare_name_is_meant_in_the_current_folder(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("out"), "new")
    assert text_of(tmp_path / "out") == "new"
