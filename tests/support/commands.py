"""Runs of the command line, in this process or in one of their own."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from taskvec_cli.main import main


def taskvec(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, as a user does."""
    return subprocess.run(
        [sys.executable, "-c", "from taskvec_cli.main import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )


def inside(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has loaded everything already."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["taskvec", *map(str, arguments)])
        # a plain terminal: help must not depend on the colours and width of the machine that runs this
        patch.setenv("NO_COLOR", "1")
        patch.setenv("COLUMNS", "100")
        if cwd is not None:
            patch.chdir(cwd)
        with pytest.raises(SystemExit) as stop:
            main()
    return subprocess.CompletedProcess(sys.argv, int(stop.value.code or 0), out.getvalue(), err.getvalue())


Run = Callable[..., "subprocess.CompletedProcess[str]"]


def ok(*arguments: object, cwd: Path | None = None, run: Run = inside) -> str:
    """Run a command that must succeed, in silence on standard error; return what it printed."""
    done = run(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def refused(code: int, *arguments: object, run: Run = inside) -> str:
    """Run a command that must fail with one sentence; return it."""
    done = run(*arguments)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("taskvec: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr
