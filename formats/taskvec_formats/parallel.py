"""Work on many pieces at once whose results come out in order: the same output whatever the number of workers.

numpy, hashlib, zstandard and pcodec let go of the interpreter's lock while they work, so threads do. Where pieces are
small, threads keep each other waiting for that lock; processes (workers.py) do not.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from .workers import allowed, forked_map

Item = TypeVar("Item")
Result = TypeVar("Result")


def threads() -> int:
    """TASKVEC_THREADS where it is a positive number, else the cores that this process may use."""
    wanted = os.environ.get("TASKVEC_THREADS", "")
    if wanted.isdecimal() and int(wanted):
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, processes: bool = False
) -> Generator[Result, None, None]:
    """Yield function(item) for each item, in order. At most two results a worker wait to be taken.

    processes: where they are allowed, run the function in forked processes. Its results are small then and can be
    pickled, it changes nothing but files, and it keeps nothing from one item for the next. Whoever stops early closes
    what is returned.
    """
    limit = threads()
    if not processes or limit == 1 or not allowed():
        yield from _threaded(function, items, limit)
        return
    yield from forked_map(function, list(items), limit, partial(_threaded, limit=1))


def _threaded(function: Callable[[Item], Result], items: Iterable[Item], limit: int) -> Generator[Result, None, None]:
    with ThreadPoolExecutor(limit) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * limit:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
