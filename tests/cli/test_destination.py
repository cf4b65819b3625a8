"""Checks of output paths: inputs are never replaced, and other existing files only with `--force`."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.building import package, sparse, vector_of, write_checkpoint
from support.commands import inside, ok, refused
from support.inputs import FILES, TENSORS, existing, into, make_inputs, snapshot

from taskvec import TaskVector, apply, compose, diff, merge, overlap
from taskvec.analysis.plots import plot_density, plot_losses, plot_overlap
from taskvec.applying.overlay import Patched
from taskvec.destination import check_apart, check_distinct, check_file, check_folder
from taskvec.errors import OutputExistsError, TaskvecError, UsageError
from taskvec.merging.model_folder import write_model
from taskvec_formats import ModelFolder


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, which contains all kinds of inputs."""
    monkeypatch.chdir(tmp_path)
    return make_inputs(tmp_path)


INPUT = "is an input"


def vectors(work: Path) -> dict[str, TaskVector]:
    """Return vectors that read a.lota, base or tuned in every possible way."""
    base, tuned, a = ModelFolder(work / "base"), ModelFolder(work / "tuned"), TaskVector.open(work / "a.lota")
    sparsified = diff(base, tuned, sparsity=0.9)
    return {
        "file": a,
        "sum": a + 0.5 * a,
        "merge": merge([a, TaskVector.open(work / "b.lota")]),
        "merge of a merge": merge([merge([a]), TaskVector.open(work / "b.lota")]),
        "chain": compose(a, diff(tuned, base)),
        "pair": diff(base, tuned),
        "patch": diff(base, tuned, kind="patch"),
        "sparsified": sparsified,
        "sum of a pair": sparsified - a,
        "chain on the base": compose(a, diff(tuned, base), base),
        "pair with a patched checkpoint": diff(base, Patched(base, a)),
    }


READ = {
    "a.lota": ("file", "sum", "merge", "merge of a merge", "chain", "chain on the base", "sum of a pair"),
    "base/config.json": ("pair", "patch", "sparsified", "sum of a pair", "chain", "chain on the base"),
    "tuned/model-00001-of-00002.safetensors": ("pair", "patch", "sparsified", "sum of a pair", "chain"),
}
READ["a.lota"] += ("pair with a patched checkpoint",)


@pytest.mark.parametrize("target", READ)
def test_a_vector_is_not_saved_over_what_it_reads(target: str, work: Path) -> None:
    made = vectors(work)
    before = snapshot(work)
    for name in READ[target]:
        with pytest.raises(UsageError, match=INPUT):
            made[name].save(work / target, force=True)
        with pytest.raises(UsageError, match=INPUT):
            made[name].save(str(work / target), force=False)
    assert snapshot(work) == before


def test_applying_replaces_neither_the_base_nor_where_the_vector_comes_from(work: Path) -> None:
    base, a = ModelFolder(work / "base"), TaskVector.open(work / "a.lota")
    inner = TaskVector.open(work / "dir" / "v.lota")
    before = snapshot(work)
    for vector, out in (
        (a, "base"),
        (a, "way"),
        (a, "."),
        (inner, "dir"),
        (diff(base, ModelFolder(work / "tuned")), "tuned"),
    ):
        for where in (work / out, str(work / out)):
            with pytest.raises(UsageError, match="input"):
                apply(vector, base, where, force=True)
    with pytest.raises(UsageError, match="input"):
        write_model(merge([a]), [a], base, work / "base", force=True)
    assert snapshot(work) == before


def test_a_vector_that_is_made_of_one_many_times_names_its_file_once(work: Path) -> None:
    vector = TaskVector.open(work / "a.lota")
    for _ in range(5):
        vector = merge([vector, vector], "linear")
    assert vector.inputs == (work / "a.lota",)


SAVES: dict[str, Callable[[Path, Any], object]] = {
    "save": lambda path, force: vector_of({"w": sparse((4,), {1: 2.0})}).save(path, **force),
    "density": lambda path, force: plot_density("a", vector_of({"w": sparse((4,), {1: 2.0})}), path, **force),
    "overlap": lambda path, force: plot_overlap(
        "ab", overlap([vector_of({"w": sparse((4,), {1: 2.0})})] * 2), path, **force
    ),
    "losses": lambda path, force: plot_losses("a", [], [1.0], [], path, **force),
}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES.keys())
def test_from_python_a_file_is_replaced_by_force_only(save: Callable[[Path, Any], object], tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    existing(path)
    with pytest.raises(OutputExistsError, match=r"x\.png exists already$"):
        save(path, {})
    assert path.read_bytes() == b"mine"
    save(path, {"force": True})
    assert path.read_bytes() != b"mine"
    assert list(tmp_path.iterdir()) == [path]


def test_answers_are_replaced_by_force_only(tmp_path: Path) -> None:
    from taskvec.evaluation.evaluate import write_answers

    existing(tmp_path / "a.jsonl")
    with pytest.raises(OutputExistsError):
        write_answers(tmp_path / "a.jsonl", [], [])
    assert (tmp_path / "a.jsonl").read_bytes() == b"mine"
    write_answers(tmp_path / "a.jsonl", [], [], force=True)
    assert (tmp_path / "a.jsonl").read_bytes() == b""


def test_from_python_a_model_folder_is_replaced_by_force_only(work: Path) -> None:
    base, a = ModelFolder(work / "base"), TaskVector.open(work / "a.lota")
    before = package(work / "dir")
    for write in (
        lambda **more: apply(a, base, work / "dir", **more),
        lambda **more: write_model(merge([a]), [a], base, work / "dir", **more),
    ):
        with pytest.raises(OutputExistsError):
            write()
        assert package(work / "dir") == before
    apply(a, base, work / "dir", force=True)
    assert package(work / "dir") == package(work / "tuned")


def test_an_existing_output_is_said_before_any_work(work: Path) -> None:
    def never(stage: str, done: int, total: int, note: str) -> None:
        raise AssertionError(f"{stage} began")

    a = TaskVector.open(work / "a.lota")
    with pytest.raises(OutputExistsError):
        a.save(work / "b.lota", never)
    with pytest.raises(OutputExistsError):
        apply(a, ModelFolder(work / "base"), work / "tuned", progress=never)


def test_inspect_has_force(work: Path) -> None:
    existing(work / "x.png")
    assert "x.png exists already; --force replaces it" in refused(2, "inspect", "a.lota", "--plot", "x.png")
    assert (work / "x.png").read_bytes() == b"mine"
    ok("inspect", "a.lota", "--plot", "x.png", "--force")
    assert (work / "x.png").read_bytes().startswith(b"\x89PNG")


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


# what cannot be an output, even with --force -> how it is made, and a part of the error message
PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "FIFO": (os.mkfifo, "out is a FIFO"),
    "socket": (_socket, "out is a socket"),
    "link to a device": (lambda path: path.symlink_to("/dev/null"), "out is a device"),
    "link to nothing": (lambda path: path.symlink_to("gone"), "out is a link to gone, which does not exist"),
    "link in a circle": (lambda path: path.symlink_to("out"), "out is a link to out, which does not exist"),
}
COMMANDS = ("pack base tuned -o {}", "unpack a.lota --base base -o {}", "merge a.lota --base base -o {}")


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
@pytest.mark.parametrize(("make", "sentence"), PLACES.values(), ids=PLACES.keys())
def test_what_is_no_plain_file_is_never_replaced(
    make: Callable[[Path], object], sentence: str, force: list[str], work: Path
) -> None:
    make(work / "out")
    before = os.lstat(work / "out")[:7]  # without times, since reading a link changes one
    for command in COMMANDS:
        assert sentence in refused(2, *command.format("out").split(), *force)
    assert os.lstat(work / "out")[:7] == before


@pytest.mark.parametrize("path", ["/dev/null", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "/dev/full"])
def test_a_device_is_no_output(path: str, work: Path) -> None:
    # only the check is called, since a failure of the command would replace a device of the machine
    for check in (check_file, check_folder):
        with pytest.raises(UsageError, match=rf"^{path} is a device"):
            check(path, force=True)


NAMES: dict[str, tuple[str, str]] = {
    "empty": ("", "name"),
    "below a file": ("a.lota/x", "is not a folder"),
    "below a file, deeper": ("a.lota/y/x", "is not a folder"),
    "too long": ("x" * 250, "too long: the file system allows 240 bytes"),
    "too long in bytes": ("ü" * 125, "too long"),
    "below a name that is too long": ("x" * 300 + "/x", "too long"),
    "no place to write": ("/proc/x", "/proc/x cannot be written: /proc: "),
}


@pytest.mark.parametrize(("name", "sentence"), NAMES.values(), ids=NAMES.keys())
def test_a_place_where_nothing_can_be_written_is_said_early(name: str, sentence: str, work: Path) -> None:
    before = snapshot(work)
    for command in COMMANDS:
        said = inside(*[name if word == "{}" else word for word in command.split()])
        assert (said.returncode, sentence in said.stderr, said.stderr.count("\n")) == (2, True, 1), said.stderr
    assert snapshot(work) == before


@pytest.mark.parametrize("length", [240, 100])
def test_the_longest_name_that_is_let_through_can_be_written(length: int, work: Path) -> None:
    for command in COMMANDS:
        name = "x" * (length - 1) + str(COMMANDS.index(command))
        ok(*command.format(name).split())
        assert (work / name).exists()


def test_training_hears_of_its_output_before_it_begins(work: Path) -> None:
    for output, sentence in (("x" * 250, "too long"), ("zdir/", "a file"), ("dir", "is a folder")):
        assert sentence in refused(2, "train", "base", "rows.jsonl", "-o", output)


def test_a_file_does_not_end_with_a_slash(work: Path) -> None:
    for command in (
        "pack base tuned -o new/",
        "arith 2*a.lota -o new/",
        "merge a.lota b.lota -o new/",
        "inspect a.lota --plot new.png/",
    ):
        assert "file" in refused(2, *command.split())
    assert not list(work.glob("new*"))
    ok("unpack", "a.lota", "--base", "base", "-o", "new/")
    assert package(work / "new") == package(work / "tuned")


# contents of a folder that is to be replaced -> how they are made, and a part of the error message; None if allowed
HELD: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "a model": (lambda folder: None, None),
    "other files": (into("optimizer.pt"), None),
    "a link to a file": (lambda folder: (folder / "vocab.txt").symlink_to("config.json"), None),
    "the Hub's notes": (into(".cache/huggingface/download/config.json.metadata"), None),
    "a cache of somebody else": (into(".cache/mine/x"), "contains the folder '.cache', which would be lost"),
    "a cache of both": (
        lambda folder: (into(".cache/mine/x")(folder), into(".cache/huggingface/x")(folder)),
        "contains the folder '.cache', which would be lost",
    ),
    "a Trainer's checkpoint": (into("checkpoint-500/model.safetensors"), "contains the folder 'checkpoint-500'"),
    "history": (into(".git/HEAD"), "contains the folder '.git'"),
    "a link to a folder": (lambda folder: (folder / "more").symlink_to(".."), "contains the folder 'more'"),
    "a FIFO": (lambda folder: os.mkfifo(folder / "pipe"), "contains 'pipe', which is not a regular file"),
    "a link to nothing": (
        lambda folder: (folder / "x").symlink_to("gone"),
        "contains 'x', which is not a regular file",
    ),
    "no model": (lambda folder: (folder / "model.safetensors").unlink(), "contains no model"),
}


@pytest.mark.parametrize(("put", "sentence"), HELD.values(), ids=HELD.keys())
def test_force_replaces_only_a_folder_that_is_a_model(
    put: Callable[[Path], object], sentence: str | None, work: Path
) -> None:
    write_checkpoint(work / "old", TENSORS, 1, FILES)
    put(work / "old")
    names = sorted(os.listdir(work / "old"))
    command = ("unpack", "a.lota", "--base", "base", "-o", "old", "--force")
    if sentence is None:
        ok(*command)
        assert package(work / "old") == package(work / "tuned")
    else:
        assert sentence in refused(2, *command)
        assert sorted(os.listdir(work / "old")) == names


def test_new_and_empty_folders_need_no_force(work: Path) -> None:
    (work / "empty").mkdir()
    for name in ("new", "empty", "new parent/new"):
        ok("unpack", "a.lota", "--base", "base", "-o", name)
        assert package(work / name) == package(work / "tuned")


def test_a_link_that_is_replaced_leaves_what_it_leads_to(work: Path) -> None:
    existing(work / "first.lota")
    (work / "latest.lota").symlink_to("first.lota")
    (work / "latest").symlink_to("dir")
    before = package(work / "dir")
    ok("merge", "a.lota", "b.lota", "-o", "latest.lota", "--force")
    ok("unpack", "a.lota", "--base", "base", "-o", "latest", "--force")
    assert (work / "first.lota").read_bytes() == b"mine"
    assert package(work / "dir") == before
    assert package(work / "latest") == package(work / "tuned")


def test_two_outputs_of_one_command_are_two(tmp_path: Path) -> None:
    check_distinct(tmp_path / "a", None, tmp_path / "b", None)
    (tmp_path / "link").symlink_to("a")
    for other in (tmp_path / "a", tmp_path / "x" / ".." / "a", tmp_path / "link"):
        with pytest.raises(UsageError, match="given for two outputs"):
            check_distinct(tmp_path / "a", other)


def test_every_link_on_the_way_to_an_input_is_part_of_it(tmp_path: Path) -> None:
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
    (tmp_path / "third" / "file").touch()
    (tmp_path / "second" / "link").symlink_to("../third/file")
    (tmp_path / "first" / "link").symlink_to("../second/link")
    for name in ("first", "second", "third", "first/link", "second/link", "third/file", "."):
        with pytest.raises(UsageError, match="input"):
            check_apart(tmp_path / name, [tmp_path / "first" / "link"])
    check_apart(tmp_path / "other", [tmp_path / "first" / "link"])
    check_apart(tmp_path / "second", [tmp_path / "third" / "file"])


def racing(path: Path) -> Callable[[str, int, int, str], None]:
    """Return a progress callback that creates another output at the end of the work."""

    def progress(stage: str, done: int, total: int, note: str) -> None:
        if done and done == total - 1 and not path.exists():
            if path.suffix:
                path.write_bytes(b"another")
            else:
                write_checkpoint(path, TENSORS)

    return progress


def test_what_appears_in_the_meantime_is_not_replaced(work: Path) -> None:
    base, a = ModelFolder(work / "base"), TaskVector.open(work / "a.lota")
    file, folder = work / "new.lota", work / "new"
    message = r"(lota|new) appeared in the meantime$"
    with pytest.raises(OutputExistsError, match=message):
        a.save(file, racing(file))
    assert file.read_bytes() == b"another"
    with pytest.raises(OutputExistsError, match=message):
        apply(a, base, folder, progress=racing(folder))
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    assert not list(work.glob(".*"))
    # with force it is replaced
    file.unlink()
    a.save(file, racing(file), force=True)
    assert file.read_bytes() == (work / "a.lota").read_bytes()


def test_errors_name_no_option_of_the_command_line(work: Path) -> None:
    for call in (
        lambda: check_file(work / "a.lota"),
        lambda: check_folder(work / "dir"),
        lambda: check_file(work / "a.lota", force=True, inputs=[work / "a.lota"]),
    ):
        with pytest.raises(TaskvecError) as raised:
            call()
        assert not re.search("--", str(raised.value))
