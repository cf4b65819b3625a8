"""Signals that end a command: Ctrl-C (SIGINT) and SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Interrupted(BaseException):
    """A signal ends the command. As an exception, it lets temporary files be removed.

    Args:
        number: The signal.

    Attributes:
        code: The exit code, 128 + the number of the signal.
        hint: What the user can do next; may be empty.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number
        self.hint = ""
        self._said = _SAID[signal.Signals(number)]

    def __str__(self) -> str:
        return f"{self._said}; {self.hint}" if self.hint else self._said


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted within the block for SIGINT and SIGTERM, unless they are ignored or handled already."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in _SAID if signal.getsignal(number) in usual}
    try:
        for number in before:
            signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Say that the command can be resumed if a signal ends the block.

    Args:
        folder: The folder of unfinished work. Without it, there is nothing to resume.
    """
    try:
        yield
    except Interrupted as stop:
        if folder.exists():
            stop.hint = "--resume continues"
        raise
