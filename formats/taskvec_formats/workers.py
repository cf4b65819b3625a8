"""Worker processes, forked: they share what is in memory, and no lock of the interpreter's.

Forking is for a program whose threads are all its own, which a library cannot know: `allowed` asks the environment.
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

from .errors import WorkerError

Item = TypeVar("Item")
Result = TypeVar("Result")
# of a function and some items: its results in order
Map = Callable[[Callable[[Item], Result], Iterable[Item]], Iterator[Result]]

SETTING = "TASKVEC_PROCESSES"


def allowed() -> bool:
    """Whether TASKVEC_PROCESSES is 1, this is Linux, and torch, whose threads do not survive a fork, is not loaded."""
    return os.environ.get(SETTING) == "1" and sys.platform == "linux" and "torch" not in sys.modules


def forked_map(
    function: Callable[[Item], Result], items: Sequence[Item], count: int, each: Map[Item, Result]
) -> Generator[Result, None, None]:
    """Yield function(item) for each item, in order, from `count` processes that take turns.

    each: how a process works through its share. Results travel through pipes, pickled. A process that is not waited for
    any more ends: it is killed when the caller stops early, and finds nobody to write to when the caller was killed.
    Raises what the function raises, what cannot be pickled as a RuntimeError of the same words, and WorkerError where a
    process was killed.
    """
    workers: list[_Worker] = []
    try:
        with _interrupts_held():
            # one at a time: those that are there end where another cannot be made
            workers.extend(_Worker(function, items[number::count], each) for number in range(min(count, len(items))))
        for number in range(len(items)):
            yield workers[number % count].take()
    finally:
        for worker in workers:
            worker.end()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait: what it raises while Python forks is lost."""
    if threading.current_thread() is not threading.main_thread():  # it is another's to answer
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        signal.raise_signal(signal.SIGINT)


class _Worker:
    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any], each: Map[Any, Any]) -> None:
        read, write = os.pipe()
        with warnings.catch_warnings():
            # Python warns of threads, of which there may be two kinds: numpy's, stopped while it forks, and the one
            # that draws progress bars, which nothing here waits for
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process = os.fork()
        if not self._process:
            os.close(read)
            _serve(write, function, items, each)
        os.close(write)
        self._results = os.fdopen(read, "rb")

    def take(self) -> Any:
        """The next result."""
        try:
            done, found = pickle.load(self._results)
        except (EOFError, pickle.UnpicklingError):
            raise WorkerError("a worker process was killed; out of memory?") from None
        if not done:
            raise found
        return found

    def end(self) -> None:
        """Let the process be gone."""
        self._results.close()
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)


def _serve(pipe: int, function: Callable[[Any], Any], items: Sequence[Any], each: Map[Any, Any]) -> NoReturn:
    """The life of a process. Nothing of what its parent holds is flushed, closed or removed."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
        os.environ[SETTING] = "0"
        with os.fdopen(pipe, "wb") as results:
            try:
                for result in each(function, items):
                    _send(results, True, result)
            except Exception as error:
                _send(results, False, _portable(error))
    finally:
        os._exit(0)


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same where another process could not make it out."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _send(results: BinaryIO, done: bool, found: object) -> None:
    pickle.dump((done, found), results, pickle.HIGHEST_PROTOCOL)
    results.flush()
