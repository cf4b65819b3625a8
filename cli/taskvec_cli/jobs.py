"""Commands in several processes, as torchrun and `accelerate launch` start them. `taskvec train` supports this."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from taskvec.launcher import launched, rank

from .interrupts import Interrupted

if TYPE_CHECKING:
    from taskvec.training.options import TrainingOptions


@contextmanager
def agreeing(options: TrainingOptions) -> Iterator[bool]:
    """Join the other processes, and raise an error that one of them has within the block in all of them.

    Args:
        options: The options of the run.

    Yields:
        Whether this process writes files and reports.
    """
    if launched() == 1:
        yield True
        return
    from taskvec.training.processes import join

    processes = join(options)
    with processes.watching(), processes.agreeing():
        yield processes.is_first


def check_dry_run(*, dry_run: bool) -> None:
    """Refuse a dry run in several processes.

    Raises:
        UsageError: It is one.
    """
    from taskvec.errors import UsageError

    if dry_run and launched() > 1:
        raise UsageError("`dry_run` estimates the memory of one process: run it without torchrun")


def in_one(function: Callable[[], None]) -> None:
    """Call a function in the process that writes files. If it raises, all processes do."""
    if launched() == 1:
        function()
        return
    from taskvec.training.processes import joined

    if (processes := joined()) is not None:
        with processes.watching():
            processes.first(function)


@contextmanager
def reporting() -> Iterator[None]:
    """Ignore further signals once the block has raised an error, so that it is reported.

    A launcher ends all processes when one has failed.
    """
    try:
        yield
    except BaseException:
        if launched() > 1:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        raise


def cause(error: Exception | Interrupted) -> Exception | Interrupted:
    """Return the end of another process if a launcher has sent a signal because of it, else the error itself.

    Args:
        error: The error that ends the command.
    """
    from taskvec.errors import ProcessError

    found: BaseException | None = error
    while isinstance(found, Interrupted):
        found = found.__context__
    return found if isinstance(found, ProcessError) else error


def says(error: BaseException) -> bool:
    """Return whether this process reports an error, which others may have too.

    Args:
        error: The error.
    """
    if launched() == 1:
        return True
    module = sys.modules.get("taskvec.training.processes")
    processes = None if module is None else module.joined()
    if processes is None:
        return rank() == 0
    if getattr(error, "is_shared", False):
        return bool(processes.is_first)
    return bool(processes.is_first_to_say())


def leave(code: int) -> None:
    """End a process that has joined others.

    Torch's engine may abort a process that ends while others still use their connections, so it is not shut down.

    Args:
        code: The exit code.
    """
    module = sys.modules.get("taskvec.training.processes")
    if module is None or module.joined() is None:
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if code:
        time.sleep(0.5)  # others may still receive what this process has sent
    os._exit(code)
