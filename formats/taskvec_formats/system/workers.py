"""Forked worker processes. They share the parent's memory, but not its global interpreter lock.

Forking is safe only if the program controls all of its threads. A library cannot know this, so a program that does
calls `allow`.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, NoReturn, TypeVar

from ..errors import WorkerError

Item = TypeVar("Item")
Result = TypeVar("Result")
# maps a function over items and yields the results in order
Map = Callable[[Callable[[Item], Result], Iterable[Item]], Iterator[Result]]

_may_fork = False


def allow(may_fork: bool = True) -> None:
    """Allow this process to be forked, or forbid it. It is forbidden at first.

    Args:
        may_fork: Whether the process may be forked.
    """
    global _may_fork  # noqa: PLW0603 - a property of the process
    _may_fork = may_fork


def allowed() -> bool:
    """Return whether this process may be forked.

    This is the case if `allow` was called, the system is Linux, and torch is not loaded, whose threads do not survive a
    fork.
    """
    return _may_fork and sys.platform == "linux" and "torch" not in sys.modules


def forked_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    count: int,
    each: Map[Item, Result],
    owners: Sequence[int] | None = None,
) -> Generator[Result, None, None]:
    """Yield function(item) for each item, in order, computed by forked processes.

    Results are pickled and sent through pipes. A process whose results are no longer needed ends: it is killed if the
    caller stops early, and it fails to write to its pipe if the caller was killed.

    Args:
        function: The function.
        items: The items.
        count: Largest number of processes.
        each: How a process maps the function over its items.
        owners: The number of the process that computes each item; None takes turns.

    Raises:
        Exception: The exception that the function raised; if it cannot be pickled, a RuntimeError with the same
            message.
        WorkerError: A process was killed.
    """
    workers: dict[int, _Worker] = {}
    owners = [number % count for number in range(len(items))] if owners is None else owners
    try:
        with _interrupts_deferred():
            # added one at a time, so that all of them are ended if another cannot be forked
            for number in sorted(set(owners)):
                own = [item for item, owner in zip(items, owners, strict=True) if owner == number]
                workers[number] = _Worker(function, own, each)
        for owner in owners:
            yield workers[owner].take()
    finally:
        for worker in workers.values():
            worker.end()


# signals whose handlers may raise an exception
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Defer SIGINT and SIGTERM: an exception that a handler raises during a fork would be lost."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return
    deferred: list[int] = []
    before = {number: signal.signal(number, lambda number, _: deferred.append(number)) for number in _INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if deferred:
        signal.raise_signal(deferred[0])


class _Worker:
    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any], each: Map[Any, Any]) -> None:
        read, write = os.pipe()
        with warnings.catch_warnings():
            # Python warns if there are other threads. There may be two kinds: numpy's, which are stopped during the
            # fork, and the one that draws progress bars, which no code here waits for
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process = os.fork()
        if not self._process:
            os.close(read)
            _serve(write, function, items, each)
        os.close(write)
        self._results = os.fdopen(read, "rb")

    def take(self) -> Any:
        """Return the next result."""
        try:
            ok, result = pickle.load(self._results)
        except (EOFError, pickle.UnpicklingError):
            raise WorkerError("a worker process was killed, possibly because memory ran out") from None
        if not ok:
            raise result
        return result

    def end(self) -> None:
        """Kill the process and wait for its end."""
        self._results.close()
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)


def _serve(pipe: int, function: Callable[[Any], Any], items: Sequence[Any], each: Map[Any, Any]) -> NoReturn:
    """Run a worker process. It flushes, closes and removes nothing that belongs to its parent."""
    try:
        for number in _INTERRUPTS:
            signal.signal(number, signal.SIG_IGN)  # the parent handles it
        allow(False)
        with os.fdopen(pipe, "wb") as results:
            try:
                for result in each(function, items):
                    _send(results, True, result)
            except Exception as error:
                _send(results, False, _portable(error))
    finally:
        os._exit(0)


def _portable(error: Exception) -> Exception:
    """Return the error, or a RuntimeError with the same message if it cannot be unpickled in another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _send(results: BinaryIO, ok: bool, result: object) -> None:
    pickle.dump((ok, result), results, pickle.HIGHEST_PROTOCOL)
    results.flush()
