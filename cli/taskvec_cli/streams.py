"""Standard input, output and error, of which a daemon or a shell may have closed any, or filled what is behind them."""

from __future__ import annotations

import os
import sys
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import Any, TextIO

_was_closed: set[int] = set()


class _Output(FileIO):
    """Standard output, whose errors say that it is."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = "standard output"
            raise


class _Errors(FileIO):
    """Standard error, of which what it cannot take is lost: there is nowhere else to say it."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def repair() -> None:
    """Put /dev/null in the place of what is closed, so that no file that is opened later gets its number.

    What is written to a standard output that was closed fails, as it does elsewhere: nobody would read the report.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        if not _is_open(number):
            os.open(os.devnull, mode)  # takes the lowest number that is free
            os.set_inheritable(number, True)
            _was_closed.add(number)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    # where they were replaced somebody listens in this process
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(_Output(1, "w", closefd=False), sys.stdout, line_buffering=os.isatty(1))
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(_Errors(2, "w", closefd=False), sys.stderr, line_buffering=True)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _text(file: FileIO, like: TextIO | None, *, line_buffering: bool) -> TextIOWrapper:
    encoding = "utf-8" if like is None else like.encoding
    # a name that the encoding lacks is no reason to fail
    return TextIOWrapper(BufferedWriter(file), encoding, "backslashreplace", line_buffering=line_buffering)


def need_no_reader() -> None:
    """Go on where standard output was closed: what the command is for lies in a file, and there is nobody to tell."""
    if 1 in _was_closed:
        _forget()


def settle() -> None:
    """Give up what standard output did not take: at the exit Python would complain once more."""
    try:
        sys.stdout.flush()
    except OSError:
        _forget()


def _forget() -> None:
    """Let standard output end in /dev/null, with what it still holds."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    sys.stdout.flush()
