"""Signals that arrive at a moment at which their handlers must not raise an exception."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_signals(*, second_at_once: bool = False) -> Iterator[Callable[[], None]]:
    """Delay the handlers of SIGINT and SIGTERM until the end of the block.

    Only the main thread runs handlers, so nothing is done in others.

    Args:
        second_at_once: Whether a second signal is not delayed.

    Yields:
        A function that runs the handler of a signal that was received, which usually raises an exception.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    replaced = {number: handler for number, handler in handlers.items() if callable(handler)}

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if second_at_once and len(received) > 1:
            check()

    def check() -> None:
        if received:
            number = received[0]
            received.clear()
            replaced[signal.Signals(number)](number, None)

    for number in replaced:
        signal.signal(number, receive)
    try:
        yield check
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
        check()
