"""Standard input, output and error, of which a daemon or a shell may have closed any, or filled what is behind them."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import IO

_was_closed: set[int] = set()


def repair() -> None:
    """Put /dev/null in the place of what is closed, so that no file that is opened later gets its number.

    What is written to a standard output that was closed fails, as it does elsewhere: nobody would read the report.
    What is written to a standard error that was closed is lost.
    """
    for number, name, mode in ((0, "stdin", os.O_RDONLY), (1, "stdout", os.O_RDONLY), (2, "stderr", os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            # the lowest number that is free is taken
            os.open(os.devnull, mode)
            os.set_inheritable(number, True)
            _was_closed.add(number)
        if getattr(sys, name) is None:
            stream = open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
    if isinstance(sys.stdout, TextIOWrapper):
        # a name that the terminal's encoding lacks is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")


def need_no_reader() -> None:
    """Go on where standard output was closed: what the command is for lies in a file, and there is nobody to tell."""
    if 1 in _was_closed:
        _forget(1, sys.stdout)


def unwritten() -> OSError | None:
    """Why standard output could not take what was written to it, if so; nothing more is tried then."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _forget(1, sys.stdout)
        error.filename = "standard output"
        return error
    return None


def say(sentence: str) -> None:
    """Write a line to standard error, if anything can be written there."""
    try:
        print(sentence, file=sys.stderr, flush=True)
    except OSError:
        _forget(2, sys.stderr)


def _forget(number: int, stream: IO[str]) -> None:
    """Let a stream, with what it still holds, end in /dev/null: at the exit Python would complain once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
    stream.flush()
