"""Commands whose standard streams are closed or full: output files are written, and failures are reported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.building import tensor, write_checkpoint

from taskvec import diff
from taskvec_formats import LotaReader

pytestmark = pytest.mark.slow

PROGRAM = "from taskvec_cli.main import main; main()"
TASKVEC = f'{sys.executable} -c "{PROGRAM}"'
buffering = pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    states = {"base": [1.0, 2, 3], "tuned": [1.0, 5, 3]}
    base, tuned = (
        write_checkpoint(tmp_path / name, {"w": tensor("F32", values)}, 1, {"config.json": b"{}"})
        for name, values in states.items()
    )
    diff(base, tuned).save(tmp_path / "a.lota")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shell(command: str, unbuffered: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in a shell, which can close file descriptors."""
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered, **more}
    return subprocess.run(
        ["bash", "-c", command.replace("taskvec ", f"{TASKVEC} ", 1)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


WRITES = {
    "pack": "taskvec pack base tuned -o new.lota",
    "merge": "taskvec merge a.lota -o new.lota --method linear",
    "arith": "taskvec arith 2*a.lota -o new.lota",
}


@pytest.mark.parametrize("closed", ["2>&-", "<&-", "0<&- 2>&-", "1>&-", "<&- 1>&- 2>&-"])
@pytest.mark.parametrize("command", WRITES.values(), ids=WRITES.keys())
def test_a_command_that_writes_a_file_needs_none_of_them(command: str, closed: str, work: Path) -> None:
    done = shell(f"{command} {closed}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("new.lota: ") == ("1>&-" not in closed)
    LotaReader(work / "new.lota").verify()
    assert sorted(path.name for path in work.iterdir()) == ["a.lota", "base", "new.lota", "tuned"]


def test_a_folder_is_written_without_them(work: Path) -> None:
    assert shell("taskvec unpack a.lota --base base -o new <&- >&- 2>&-").returncode == 0
    assert (work / "new" / "model.safetensors").read_bytes() == (work / "tuned" / "model.safetensors").read_bytes()


FAILS = {
    "usage": ("taskvec pack base tuned -o base/config.json --force", 2),
    "usage of the command line": ("taskvec pack base", 2),
    "failure": ("taskvec verify base/config.json", 1),
    "no command": ("taskvec nothing", 2),
}


@pytest.mark.parametrize("where", ["2>&-", "2>/dev/full", "1>&- 2>&-"])
@pytest.mark.parametrize(("command", "code"), FAILS.values(), ids=FAILS.keys())
def test_where_nothing_can_be_said_the_exit_code_is_the_same(command: str, code: int, where: str, work: Path) -> None:
    done = shell(f"{command} {where}")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


REPORTS = {
    "inspect": "taskvec inspect a.lota",
    "two": "taskvec inspect a.lota a.lota",
    "json": "taskvec inspect a.lota --json",
    "verify": "taskvec verify a.lota",
    "version": "taskvec --version",
    "help": "taskvec --help",
    "help of a command": "taskvec inspect --help",
    "json of a file that is written": "taskvec pack base tuned -o new.lota --json",
}


@buffering
@pytest.mark.parametrize(
    ("where", "why"),
    [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")],
)
@pytest.mark.parametrize("command", REPORTS.values(), ids=REPORTS.keys())
def test_a_report_that_cannot_be_written_is_a_failure(
    command: str, where: str, why: str, unbuffered: str, work: Path
) -> None:
    done = shell(f"{command} {where}", unbuffered)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"taskvec: standard output: {why}")
    assert done.stderr.count("\n") == 1


@buffering
def test_whoever_stops_reading_hears_nothing_more(unbuffered: str, work: Path) -> None:
    """The pipe is closed before anything is written; other tools are silent in this case, too."""
    for command in ("taskvec inspect a.lota a.lota", "taskvec --help"):
        read, write = os.pipe()
        os.close(read)
        words = command.split()[1:]
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *words], stdout=write, stderr=subprocess.PIPE, check=False, env=environment
        )
        os.close(write)
        assert (done.returncode, done.stderr) == (1, b"")


def test_no_file_that_is_opened_gets_the_number_of_standard_error(work: Path) -> None:
    """Otherwise messages of libraries would be written into that file."""
    program = (
        "import os, sys; from taskvec_cli import streams; streams.repair(); opened = os.open('new', os.O_CREAT)\n"
        "os.write(2, b'said'); print(opened > 2, sys.stdin.read() == '', file=open('seen', 'w'))"
    )
    done = shell(f'{sys.executable} -c "{program}" <&- >&- 2>&-')
    assert done.returncode == 0
    assert (work / "seen").read_text() == "True True\n"
    assert (work / "new").read_bytes() == b""


def test_a_name_that_the_encoding_lacks_is_written_all_the_same(work: Path) -> None:
    (work / "a.lota").rename(work / "λ.lota")
    done = shell("taskvec inspect *.lota", PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("\\u03bb.lota: ")
