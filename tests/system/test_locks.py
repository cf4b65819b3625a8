"""One process at a time works in a folder, and where there are no locks the work goes on without them."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.building import package, tensor, write_checkpoint
from support.models import make_llama, write_rows

from taskvec import TaskVector, diff
from taskvec.applying.apply import apply
from taskvec.errors import ResumeError
from taskvec.resume import RecordedFolder, holds_work, remove_work
from taskvec_formats import LotaReader, ModelFolder
from taskvec_formats.system import locks
from taskvec_formats.system.atomic import atomic_directory, atomic_file
from taskvec_formats.system.locks import Lock

pytestmark = pytest.mark.slow

TASKVEC = [sys.executable, "-c", "from taskvec_cli.main import main; main()"]
HOLD = (
    "import os, sys, time; from pathlib import Path; from taskvec_formats.system.locks import Lock\n"
    "lock = Lock(Path(sys.argv[1])); child = sys.argv[2] == 'fork' and not os.fork()\n"
    "print(os.getpid(), flush=True) if child or sys.argv[2] != 'fork' else None; time.sleep(60)"
)


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_lock_ends_with_the_process_that_took_it(how: str, tmp_path: Path) -> None:
    """Also where a worker of it lives on."""
    command = [sys.executable, "-c", HOLD, str(tmp_path), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        child = int(process.stdout.readline())
        with pytest.raises(BlockingIOError):
            Lock(tmp_path)
        process.kill()
        process.wait()
        lock = Lock(tmp_path)
        assert lock.is_held
        lock.release()
        if how == "fork":
            os.kill(child, signal.SIGKILL)


def test_a_folder_that_is_in_use_is_neither_gone_on_with_nor_removed(tmp_path: Path) -> None:
    work = tmp_path / "m.part"
    with RecordedFolder(work, "merge", {"a": 1}) as keep:
        keep.begin()
        for resume in (True, False):
            with pytest.raises(ResumeError, match=r"m\.part is in use by another process$"):
                RecordedFolder(work, "merge", {"a": 1}, resume=resume)
        with pytest.raises(ResumeError, match="in use"):
            holds_work(work, "merge")
        remove_work(work)
        assert json.loads((work / "run.json").read_text()) == {"kind": "merge", "a": 1}
    assert holds_work(work, "merge")
    remove_work(work)
    assert not work.exists()
    assert not holds_work(work, "merge")


def test_two_that_begin_at_once_do_not_share_the_folder(tmp_path: Path) -> None:
    work = tmp_path / "m.part"
    with RecordedFolder(work, "merge", {}) as first, RecordedFolder(work, "merge", {}) as second:
        first.begin()
        with pytest.raises(ResumeError, match="in use"):
            second.begin()
        second.remove()
        assert (work / "run.json").exists()


def test_beginning_anew_removes_all_but_the_lock(tmp_path: Path) -> None:
    work = tmp_path / "m.part"
    with RecordedFolder(work, "merge", {"a": 1}) as keep:
        keep.begin()
    (work / "checkpoints").mkdir()
    (work / "checkpoints" / "x").touch()
    (work / "shard").touch()
    with pytest.raises(ResumeError, match="belongs to another merge: a is 1 there, but 2 here"):
        RecordedFolder(work, "merge", {"a": 2})
    with RecordedFolder(work, "merge", {"a": 2}, resume=False) as keep:
        assert (work / "shard").exists()
        keep.begin()
        assert [path.name for path in work.iterdir()] == ["run.json"]
        with pytest.raises(ResumeError, match="in use"):
            RecordedFolder(work, "merge", {"a": 2})
    assert json.loads((work / "run.json").read_text()) == {"kind": "merge", "a": 2}


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def refuse(descriptor: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(locks, "_flock", refuse)


@pytest.mark.usefixtures("no_locks")
def test_everything_is_written_where_there_are_no_locks(tmp_path: Path) -> None:
    states = {"base": [1.0, 2, 3], "tuned": [1.0, 5, 3]}
    base, tuned = (write_checkpoint(tmp_path / n, {"w": tensor("F32", values)}) for n, values in states.items())
    diff(base, tuned).save(tmp_path / "a.lota")
    LotaReader(tmp_path / "a.lota").verify()
    apply(TaskVector.open(tmp_path / "a.lota"), base, tmp_path / "out")
    assert package(tmp_path / "out") == package(tmp_path / "tuned")
    total = 2 * TaskVector.open(tmp_path / "a.lota")
    apply(total, base, tmp_path / "again", work=tmp_path / "again.part")
    assert ModelFolder(tmp_path / "again").bits("w").view(np.float32)[1] == 8
    assert not (tmp_path / "again.part").exists()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_nobody_knows_what_was_abandoned(tmp_path: Path) -> None:
    left = tmp_path / ".a.lota.x1.part"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    with atomic_file(tmp_path / "a.lota") as temporary:
        temporary.write_bytes(b"whole")
    assert left.exists()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_is_written_to(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_bytes(b"1")
    with atomic_directory(tmp_path / "folder") as temporary:
        (temporary / "file").write_bytes(b"1")
    assert (tmp_path / "file").read_bytes() == (tmp_path / "folder" / "file").read_bytes() == b"1"


def test_a_sync_that_fails_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"), atomic_file(tmp_path / "file"):
        pass
    assert not list(tmp_path.iterdir())


def no_link(source: Path, target: Path) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_new_file_never_replaces_another(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:
        monkeypatch.setattr(os, "link", no_link)
    path = tmp_path / "out"
    with atomic_file(path, replace=False) as temporary:
        temporary.write_text("first")
    assert path.read_text() == "first"
    assert path.stat().st_nlink == 1
    with (
        pytest.raises(FileExistsError, match="appeared in the meantime"),
        atomic_file(path, replace=False) as temporary,
    ):
        temporary.write_text("second")
    path.unlink()
    path.symlink_to("gone")
    with pytest.raises(FileExistsError), atomic_file(path, replace=False):
        pass
    assert os.readlink(path) == "gone"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_a_new_folder_never_replaces_anything(what: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    if what == "folder":
        path.mkdir()
        (path / "theirs").touch()
    elif what == "file":
        path.touch()
    else:
        path.symlink_to("gone")
    with (
        pytest.raises(FileExistsError, match="appeared in the meantime"),
        atomic_directory(path, replace=False) as temporary,
    ):
        (temporary / "mine").touch()
    assert list(tmp_path.iterdir()) == [path]
    assert not (path / "mine").exists()


def test_a_new_folder_takes_the_place_of_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out", replace=False) as temporary:
        (temporary / "mine").touch()
    assert (tmp_path / "out" / "mine").exists()


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and two vectors that differ."""
    folder = tmp_path_factory.mktemp("states")
    dice = np.random.default_rng(0)
    weights = {f"layers.{i}.weight": dice.normal(size=(200, 200)) for i in range(40)}
    for name, scale in (("base", 0.0), ("a", 1e-3), ("b", 2e-3)):
        tensors = {n: tensor("F32", w + scale * dice.normal(size=w.shape)) for n, w in weights.items()}
        write_checkpoint(folder / name, tensors, 1, {"config.json": b"{}"})
    for name in "ab":
        diff(ModelFolder(folder / "base"), ModelFolder(folder / name)).save(folder / f"{name}.lota")
    return folder


COMMANDS = {
    "pack": ["pack", "{0}/base", "{0}/{1}", "-o", "{2}"],
    "unpack": ["unpack", "{0}/{1}.lota", "--base", "{0}/base", "-o", "{2}"],
    "merge": ["merge", "{0}/{1}.lota", "--method", "linear", "-o", "{2}"],
}


@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_of_two_commands_on_one_new_output_one_is_refused(
    command: list[str], force: bool, states: Path, tmp_path: Path
) -> None:
    def started(name: str, out: Path) -> subprocess.Popen[str]:
        words = [word.format(states, name, out) for word in command]
        more = ["--force"] if force else []
        return subprocess.Popen([*TASKVEC, *words, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def content(path: Path) -> object:
        return package(path) if path.is_dir() else path.read_bytes()

    results = {}
    for name in "ab":
        with started(name, tmp_path / name) as process:
            process.communicate()
        results[name] = content(tmp_path / name)
    assert results["a"] != results["b"]
    out = tmp_path / "out"
    with started("a", out) as first, started("b", out) as second:
        said = {"a": first.communicate()[1], "b": second.communicate()[1]}
        codes = {"a": first.returncode, "b": second.returncode}
    if force:
        assert codes == {"a": 0, "b": 0}, said
        assert content(out) in results.values()
    else:
        assert sorted(codes.values()) == [0, 2], said
        (winner,) = (name for name, code in codes.items() if code == 0)
        (loser,) = (name for name, code in codes.items() if code)
        assert content(out) == results[winner]
        assert said[loser] in {
            f"taskvec: {out} appeared in the meantime; --force replaces it\n",
            f"taskvec: {out} exists already; --force replaces it\n",  # it was slow to begin
        }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


def waits_for(condition: object, process: subprocess.Popen[str]) -> None:
    assert callable(condition)
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def test_of_two_merges_that_go_on_one_is_told_that_the_folder_is_in_use(states: Path, tmp_path: Path) -> None:
    merge = ["merge", str(states / "a.lota"), str(states / "b.lota"), "--method", "linear", "--shard-size", "160KB"]
    merge += ["--base", str(states / "base"), "-o", str(tmp_path / "m"), "--resume"]
    part = tmp_path / "m.part"
    first = subprocess.Popen([*TASKVEC, *merge], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with first:
        waits_for(lambda: list(part.glob("model-*")), first)
        first.send_signal(signal.SIGSTOP)
        for flag in ("--resume", "--force"):
            second = subprocess.run([*TASKVEC, *merge[:-1], flag], capture_output=True, text=True, check=False)
            assert second.returncode == 1
            assert second.stderr == f"taskvec: {part} is in use by another process\n"
        first.send_signal(signal.SIGCONT)
        assert first.communicate()[1] == f"taskvec: note: there is nothing to resume in {part}: the merge starts anew\n"
        assert first.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]
    assert len(ModelFolder(tmp_path / "m").tensors) == 40


def test_of_two_trainings_that_go_on_one_is_told_that_the_folder_is_in_use(tmp_path: Path) -> None:
    base, data = make_llama(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl")
    recipe = "--calibration-steps 2 --steps 1000 --save-steps 1 --batch-size 2 --lr 1e-3 --device cpu --resume".split()
    train = ["train", str(base), str(data), *recipe, "-o", str(tmp_path / "x.lota")]
    folder = tmp_path / "x.lota.run"
    first = subprocess.Popen([*TASKVEC, *train], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with first:
        waits_for(lambda: list(folder.glob("checkpoints/*/complete")), first)
        first.send_signal(signal.SIGSTOP)
        second = subprocess.run([*TASKVEC, *train], capture_output=True, text=True, check=False)
        assert (second.returncode, second.stderr) == (1, f"taskvec: {folder} is in use by another process\n")
        first.kill()
    assert holds_work(folder, "run")  # killed, it locks nothing any more
