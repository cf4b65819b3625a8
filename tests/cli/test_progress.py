"""Progress reports: bars on a terminal, and lines at intervals elsewhere, for long work only."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from taskvec.reporting.bars import progress_bars
from taskvec.reporting.report import Report


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Stream(io.StringIO):
    """A standard error that sets an event once it has received a number of lines."""

    def __init__(self, lines: int) -> None:
        super().__init__()
        self.reached = threading.Event()
        self.lines = lines

    def flush(self) -> None:
        if self.getvalue().count("\n") >= self.lines:
            self.reached.set()


def test_a_line_says_the_stage_its_steps_the_note_and_the_time_left() -> None:
    clock = Clock()
    report = Report(clock)
    assert report.line().startswith("[0:00:00] working, ")
    clock.now += 10
    report.show("training", 40, 600)  # a run that continues after an interruption
    assert report.line().startswith("[0:00:10] training 40/600, ")
    clock.now += 60
    report.show("training", 60, 600, "loss 2.113, 1,234 tokens/s")
    assert report.line().startswith("[0:01:10] training 60/600, loss 2.113, 1,234 tokens/s, 0:27:00 left, ")
    clock.now += 120
    assert "0:25:00 left" in report.line()
    if sys.platform == "linux":
        assert report.line().endswith(" memory")
    report.show("training", 600, 600)
    assert "left" not in report.line()


def test_a_stage_that_begins_again_is_measured_anew() -> None:
    clock = Clock()
    report = Report(clock)
    for done in (0, 8):
        report.show("evaluating", done, 8)
        clock.now += 1000
    report.show("evaluating", 0, 8)
    assert "left" not in report.line()
    clock.now += 2
    report.show("evaluating", 2, 8)
    assert "evaluating 2/8, 0:00:06 left" in report.line()


def test_a_line_is_one_printable_line_whatever_is_reported() -> None:
    report = Report(Clock())
    report.show("tasks\n\x1b[31m", 1, 2, "a\rb" + "x" * 1000)
    line = report.line()
    assert line.isprintable()
    assert len(line) <= 200
    assert "tasks\\n\\x1b[31m 1/2" in line


def test_lines_come_while_a_step_takes_long_and_stop_with_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(lines=3)
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bars(first=0, every=0.01) as progress:
        progress("calibrating", 0, 20, "")
        assert stream.reached.wait(60), "no line was printed"
    said = stream.getvalue().splitlines()
    assert len(said) >= 3
    assert all(line.startswith("[0:0") for line in said)
    assert "calibrating 0/20" in said[-1]
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_quick_work_prints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bars() as progress:
        progress("packing", 1, 1, "")
    assert stream.getvalue() == ""


def test_a_stream_that_was_closed_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bars(first=0, every=0) as progress:
        stream.close()
        while any(thread.name == "progress" for thread in threading.enumerate()):
            progress("packing", 1, 2, "")


@pytest.mark.parametrize(("where", "lines"), [("2>&-", False), ("2>/dev/full", False), ("2>said", True)])
def test_lines_need_no_standard_error(where: str, lines: bool, tmp_path: Path) -> None:
    program = (
        "import os, time; from taskvec_cli import streams; from taskvec.reporting.bars import progress_bars\n"
        "streams.repair()\n"
        "with progress_bars(0, 0.001) as progress:\n"
        "    progress('packing', 1, 2, ''); time.sleep(0.05)\n"
        "    while os.path.exists('said') and 'packing' not in open('said').read(): pass\n"
        "print('done')"
    )
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{program}" {where}'],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    assert lines == any("packing 1/2" in path.read_text() for path in tmp_path.iterdir())


def shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: int, *steps: tuple[str, int, int, str]) -> str:
    """Return what the bars write to a terminal of this width for a sequence of steps."""
    parent, child = pty.openpty()
    shown = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # on Linux, reading at the end of a terminal raises
            while chunk := os.read(parent, 1 << 16):
                shown.extend(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(child, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm")
        with progress_bars() as progress:
            for step in steps:
                progress(*step)
    reader.join(timeout=60)
    os.close(parent)
    return shown.decode()


def test_bars_show_the_same_figures_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = ("[red]training", 1, 600, "loss 2.113"), ("[red]training", 2, 600, "loss 2.0")
    text = shown_on_a_terminal(monkeypatch, 160, *steps)
    assert "[red]training" in text
    assert "2/600" in text
    assert "loss 2.0" in text
    if sys.platform == "linux":
        assert "memory" in text


@pytest.mark.parametrize("stage", ["writing", "50%: calibrating at a rate", "stage " * 30])
def test_bars_fit_a_terminal_of_80_columns(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.31.block_sparse_moe.experts.7.w1.weight"
    text = shown_on_a_terminal(monkeypatch, 80, (stage, 1, 26_000, name), (stage, 12_345, 26_000, name * 3))
    lines = [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)) if line.strip()]
    assert all(len(line) <= 80 for line in lines)
    assert stage[:20] in lines[-1]
    assert "12345/26000" in lines[-1]
    assert "model.l" in lines[-1]
