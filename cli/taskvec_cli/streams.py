"""Standard streams that are closed, or whose device is full, as under a daemon or in some shells."""

from __future__ import annotations

import os
import sys
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import Any, TextIO

_was_closed: set[int] = set()


class _Output(FileIO):
    """Standard output. Its errors name it in place of a file."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = "standard output"
            raise


class _Errors(FileIO):
    """Standard error. Output that cannot be written is discarded, since there is no other place to report it."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def repair() -> None:
    """Open /dev/null for each closed standard stream, so that no file opened later gets its descriptor number.

    Writing to a standard output that was closed still fails, as in other programs, since the report would be lost.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        if not _is_open(number):
            os.open(os.devnull, mode)  # gets the lowest free number
            os.set_inheritable(number, True)
            _was_closed.add(number)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    # a stream that was replaced is captured within this process and is left alone
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
    # file names may contain characters that the encoding cannot represent
    return TextIOWrapper(BufferedWriter(file), encoding, "backslashreplace", line_buffering=line_buffering)


def need_no_reader() -> None:
    """Discard the report if standard output was closed. For commands whose result is a file, this is no failure."""
    if 1 in _was_closed:
        _forget()


def settle() -> None:
    """Discard what cannot be written to standard output; otherwise Python reports the error again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        _forget()


def _forget() -> None:
    """Redirect standard output to /dev/null, together with what it still buffers."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    sys.stdout.flush()
