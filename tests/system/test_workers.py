"""Worker processes give what threads give, and go where their parent goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from support.building import package, tensor, write_checkpoint

from taskvec import TaskVector, diff, merge
from taskvec.errors import MergeError
from taskvec_formats import ModelFolder, SparseTensor
from taskvec_formats.errors import ChecksumError, WorkerError
from taskvec_formats.system.parallel import ordered_map
from taskvec_formats.system.workers import allow, allowed, forked_map

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only"),
]
TASKVEC = [sys.executable, "-c", "from taskvec_cli.main import main; main()"]


def each(function: Callable[[int], object], items: Iterable[int]) -> Iterator[object]:
    return map(function, items)


def is_running(process: int) -> bool:
    """A process that ended and that nobody waits for is not running."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(processes: Iterable[int]) -> bool:
    """Whether all of them end within a while."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if not any(map(is_running, processes)):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("items", [0, 1, 2, 50])
def test_results_are_in_the_order_of_the_items(items: int, count: int) -> None:
    found = list(forked_map(lambda n: (n * n, os.getpid()), range(items), count, each))
    assert [square for square, _ in found] == [n * n for n in range(items)]
    processes = {process for _, process in found}
    assert len(processes) == min(items, count)
    assert os.getpid() not in processes
    assert gone(processes)


def test_results_may_be_larger_than_a_pipe() -> None:
    assert list(forked_map(lambda n: bytes([n]) * 3_000_000, range(5), 2, each)) == [
        bytes([n]) * 3_000_000 for n in range(5)
    ]


def test_an_error_comes_at_its_place_and_as_itself() -> None:
    def work(item: int) -> int:
        if item == 5:
            raise ChecksumError("tensor 'a': damaged")
        return item

    results = forked_map(work, range(20), 3, each)
    assert [next(results) for _ in range(5)] == list(range(5))
    with pytest.raises(ChecksumError, match=r"^tensor 'a': damaged$"):
        next(results)


class PairError(Exception):
    """An error that pickle takes apart and cannot put together."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} is not {other}")


def test_an_error_that_cannot_travel_is_said() -> None:
    class LocalError(Exception):
        """An error that pickle does not find."""

    for error, said in ((PairError(1, 2), "PairError: 1 is not 2"), (LocalError("here"), "LocalError: here")):

        def work(item: int, error: Exception = error) -> int:
            raise error

        with pytest.raises(RuntimeError, match=f"^{said}$"):
            list(forked_map(work, range(2), 2, each))


def test_an_error_of_the_system_keeps_its_number() -> None:
    def work(item: int) -> int:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as raised:
        list(forked_map(work, range(2), 2, each))
    assert (raised.value.errno, raised.value.filename) == (28, None)


def test_a_worker_that_is_killed_is_said() -> None:
    def work(item: int) -> int:
        if item == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    results = forked_map(work, range(6), 2, each)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(WorkerError, match="a worker process was killed"):
        next(results)


def test_whoever_stops_early_leaves_no_process() -> None:
    def work(item: int) -> int:
        if item > 1:
            time.sleep(600)
        return os.getpid()

    results = forked_map(work, range(10), 2, each)
    processes = [next(results), next(results)]
    results.close()
    assert gone(processes)


PARENT = """
import os, signal, sys, time
from taskvec_formats.system.workers import forked_map

signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it would be ignored

def work(item):
    os.write(1, b"%d\\n" % os.getpid())
    return bytes(1_000_000)

try:
    for _ in forked_map(work, range(1000), 3, map):
        time.sleep(600)
except KeyboardInterrupt:
    print("interrupted")
"""


@contextmanager
def parent_of_three(script: str) -> Iterator[tuple[subprocess.Popen[str], set[int]]]:
    """A process whose three workers have begun, and those."""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as parent:
        try:
            assert parent.stdout
            workers: set[int] = set()
            while len(workers) < 3:
                workers.add(int(parent.stdout.readline()))
            yield parent, workers
        finally:
            parent.kill()


def test_workers_do_not_outlive_a_parent_that_is_killed() -> None:
    with parent_of_three(PARENT) as (parent, workers):
        parent.kill()
        parent.wait()
        assert gone(workers)


def test_an_interruption_is_the_parents_to_answer() -> None:
    with parent_of_three(PARENT) as (parent, workers):
        os.killpg(parent.pid, signal.SIGINT)  # as Ctrl-C in a terminal
        said, errors = parent.communicate(timeout=60)
        assert said.split()[-1] == "interrupted"
        assert errors == ""
        assert gone(workers)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let processes work, though other tests have loaded torch: nothing here uses it."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv("TASKVEC_THREADS", "2")
    allow()
    yield
    allow(False)


@pytest.mark.usefixtures("processes")
def test_processes_work_where_they_are_wanted_and_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def owner(item: int) -> tuple[int, bool]:
        return os.getpid(), allowed()

    here = os.getpid()
    found = set(ordered_map(owner, range(10), processes=True))
    assert len(found) == 2
    assert all(process != here and not again for process, again in found)
    assert set(ordered_map(owner, range(10))) == {(here, True)}
    monkeypatch.setenv("TASKVEC_THREADS", "1")
    assert set(ordered_map(owner, range(10), processes=True)) == {(here, True)}
    monkeypatch.setenv("TASKVEC_THREADS", "2")
    allow(False)
    assert set(ordered_map(owner, range(10), processes=True)) == {(here, False)}
    allow()
    monkeypatch.setitem(sys.modules, "torch", sys)
    assert not allowed()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two fine-tunes of it and their vectors; one tensor has several blocks."""
    made = tmp_path_factory.mktemp("workers")
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (2100, 2048), "b.weight": (300, 40), "c.bias": (7,), "d.scale": ()}
    base = {name: rng.normal(size=shape) * 0.02 for name, shape in shapes.items()}
    write_checkpoint(
        made / "base", {name: tensor("F32", value) for name, value in base.items()}, 2, {"config.json": b"{}"}
    )
    for number in (0, 1):
        tuned = {
            name: tensor("F32", value + 1e-3 * rng.normal(size=value.shape) * (rng.random(value.shape) < 0.05))
            for name, value in base.items()
        }
        write_checkpoint(made / f"tuned{number}", tuned, 2, {"config.json": b"{}"})
        diff(ModelFolder(made / "base"), ModelFolder(made / f"tuned{number}")).save(made / f"{number}.lota")
    return made


def commands(folder: Path, out: Path) -> list[list[str]]:
    """Every command that shares its work among processes, and where it must not."""
    vectors, base = [str(folder / f"{n}.lota") for n in (0, 1)], str(folder / "base")
    return [
        ["pack", base, str(folder / "tuned0"), "-o", str(out / "packed.lota")],
        ["pack", base, str(folder / "tuned0"), "--kind", "patch", "-o", str(out / "patch.lota")],
        ["unpack", vectors[0], "--base", base, "-o", str(out / "unpacked")],
        ["merge", *vectors, "-o", str(out / "ties.lota")],
        ["merge", *vectors, "--method", "ties", "--density", "0.02", "-o", str(out / "trimmed.lota")],
        ["merge", *vectors, "--base", base, "-o", str(out / "merged")],
        ["merge", *vectors, "--base", base, "--dtype", "bfloat16", "--shard-size", "1MB", "-o", str(out / "small")],
        ["arith", f"{vectors[0]} - {vectors[1]}", "-o", str(out / "difference.lota")],
    ]


def test_commands_write_the_same_bytes_in_one_process_and_in_several(folder: Path, tmp_path: Path) -> None:
    outputs = []
    for threads in ("1", "3"):
        out = tmp_path / threads
        out.mkdir()
        for command in commands(folder, out):
            environment = {**os.environ, "TASKVEC_THREADS": threads}
            done = subprocess.run([*TASKVEC, *command], env=environment, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, ""), done.stderr
        outputs.append({path.name: package(path) if path.is_dir() else path.read_bytes() for path in out.iterdir()})
    assert all(output == outputs[0] for output in outputs)
    assert outputs[0]["unpacked"] == package(folder / "tuned0")


def test_bars_on_a_terminal_and_processes_get_along(folder: Path, tmp_path: Path) -> None:
    merge([TaskVector.open(folder / f"{number}.lota") for number in (0, 1)]).save(tmp_path / "alone.lota")
    ours, theirs = os.openpty()
    command = [*TASKVEC, "merge", str(folder / "0.lota"), str(folder / "1.lota"), "-o", str(tmp_path / "out.lota")]
    environment = {**os.environ, "TASKVEC_THREADS": "3", "TERM": "xterm"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment) as process:
        os.close(theirs)
        drawn = b""
        with suppress(OSError):  # nobody holds the other end any more
            while True:
                drawn += os.read(ours, 1 << 16)
    os.close(ours)
    assert process.returncode == 0
    assert b"writing" in drawn
    assert (tmp_path / "out.lota").read_bytes() == (tmp_path / "alone.lota").read_bytes()


def test_an_error_in_a_process_is_the_commands_sentence(folder: Path, tmp_path: Path) -> None:
    damaged = bytearray((folder / "0.lota").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "damaged.lota").write_bytes(damaged)
    said = []
    for threads in ("1", "2"):
        done = subprocess.run(
            [*TASKVEC, "merge", str(tmp_path / "damaged.lota"), str(folder / "1.lota"), "--method", "linear"],
            env={**os.environ, "TASKVEC_THREADS": threads},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert not (tmp_path / "merged.lota").exists()
        said.append(done.stderr)
    assert said[0] == said[1]
    assert "damaged.lota: tensor " in said[0]


@pytest.mark.usefixtures("processes")
def test_what_looks_beyond_a_range_stays_in_one_process(folder: Path) -> None:
    vectors = [TaskVector.open(folder / f"{number}.lota") for number in (0, 1)]
    for method, options, by_range in (
        ("linear", {}, True),
        ("ties", {}, True),
        ("ties", {"density": 1.0}, True),
        ("ties", {"density": 0.02}, False),
        ("breadcrumbs", {"density": 0.02}, False),
    ):
        merged = merge(vectors, method, **options)
        assert merged.source.by_range is by_range
        assert (merged + vectors[0]).source.by_range is by_range
        assert merge([merged, vectors[0]], "linear").source.by_range is by_range
        assert all(isinstance(merged[name], SparseTensor) for name in merged)


def test_who_looks_for_an_error_sees_where_it_was_raised(folder: Path, tmp_path: Path) -> None:
    command = ["merge", str(folder / "0.lota"), *"--method linear --weights 1e300 -o".split(), str(tmp_path / "m.lota")]
    environment = {**os.environ, "TASKVEC_DEBUG": "1", "TASKVEC_THREADS": "2"}
    done = subprocess.run([*TASKVEC, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "in _combined" in done.stderr
    assert done.stderr.splitlines()[-1].endswith(
        "MergeError: tensor 'a.weight': a weighted sum leaves the range of f32"
    )


@pytest.mark.usefixtures("processes")
def test_a_merge_error_crosses_the_border(folder: Path, tmp_path: Path) -> None:
    vectors = [TaskVector.open(folder / f"{number}.lota") for number in (0, 1)]
    with pytest.raises(MergeError, match=r"^tensor 'a.weight': a weighted sum leaves the range of f32$"):
        merge(vectors, "linear", [1e300, 1.0]).save(tmp_path / "m.lota")
    assert list(tmp_path.iterdir()) == []
