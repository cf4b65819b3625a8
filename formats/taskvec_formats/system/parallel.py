"""Parallel map with results in order, so that the output does not depend on the number of workers.

Threads are enough for most work, because numpy, hashlib, zstandard and pcodec release the global interpreter lock. For
small items, threads contend for that lock; processes (see `workers`) do not.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from .workers import allowed, forked_map

Item = TypeVar("Item")
Result = TypeVar("Result")


# bytes; measured for commands on models of billions of weights (benchmarks/large.py)
PROCESS, WORKER = 100_000_000, 260_000_000
LEAST_MEMORY = PROCESS + WORKER
_memory = 1_000_000_000


def limit_memory(most: int) -> None:
    """Limit the number of workers, so that this process and its workers use about this much memory.

    Args:
        most: Bytes, at least LEAST_MEMORY. The limit is 1 GB at first.
    """
    global _memory  # noqa: PLW0603 - a property of the process
    _memory = most


def threads() -> int:
    """Return the number of workers.

    This is TASKVEC_THREADS if it is a positive number, else the number of cores available to this process; and not more
    than fit in the memory that `limit_memory` allows.
    """
    wanted = os.environ.get("TASKVEC_THREADS", "")
    count = int(wanted) if wanted.isdecimal() and int(wanted) else _cores()
    return max(1, min(count, (_memory - PROCESS) // WORKER))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shares(loads: Sequence[int]) -> list[int]:
    """Assign items to workers, the largest first, each to the one that has the least so far.

    Args:
        loads: The work of each item, in any unit.

    Returns:
        The number of a worker for each item.
    """
    totals, found = [0] * threads(), [0] * len(loads)
    for item in sorted(range(len(loads)), key=lambda item: -loads[item]):
        found[item] = min(range(len(totals)), key=totals.__getitem__)
        totals[found[item]] += loads[item]
    return found


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    processes: bool = False,
    workers: Sequence[int] | None = None,
) -> Generator[Result, None, None]:
    """Yield function(item) for each item, in order, computed in parallel.

    At most two results per worker are held until they are consumed. A caller that stops early must close the generator.

    Args:
        function: The function.
        items: The items.
        processes: Whether to use forked processes if they are allowed (see `workers.allowed`). The results must then be
            small and picklable. The function must not change anything but files, and must not keep state from one item
            to the next.
        workers: The number of the process that computes each item, as `shares` returns it; None takes turns. Threads
            take the next item.
    """
    limit = threads()
    if not processes or limit == 1 or not allowed():
        yield from _threaded(function, items, limit)
        return
    yield from forked_map(function, list(items), limit, partial(_threaded, limit=1), workers)


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
