"""Functions that run the command line, in this process or in a new one."""

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
    """Run a command in a new process, as a user does."""
    return subprocess.run(
        [sys.executable, "-c", "from taskvec_cli.main import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )


def inside(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which is faster, since all modules are loaded already."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["taskvec", *map(str, arguments)])
        # a fixed terminal, so that help does not depend on the colours and width of the current one
        patch.setenv("NO_COLOR", "1")
        patch.setenv("COLUMNS", "100")
        if cwd is not None:
            patch.chdir(cwd)
        with pytest.raises(SystemExit) as stop:
            main()
    return subprocess.CompletedProcess(sys.argv, int(stop.value.code or 0), out.getvalue(), err.getvalue())


Run = Callable[..., "subprocess.CompletedProcess[str]"]


def ok(*arguments: object, cwd: Path | None = None, run: Run = inside) -> str:
    """Run a command that must succeed and print nothing to standard error; return its standard output."""
    done = run(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def refused(code: int, *arguments: object, run: Run = inside) -> str:
    """Run a command that must fail with this exit code and an error message of one line; return the message."""
    done = run(*arguments)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("taskvec: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr
