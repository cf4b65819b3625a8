"""Whole processes: wall time and peak memory, start-up and imports included."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

_INTERVAL = 0.02  # seconds between two looks at a process and its children


def measure(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident MB of a command.

    A command of several processes: the most that they hold together, pages that they share counted in each.
    """
    with open(os.devnull, "w") as nowhere:
        start = time.perf_counter()
        actions = [(os.POSIX_SPAWN_DUP2, nowhere.fileno(), 1)]
        child = os.posix_spawnp(command[0], command, os.environ, file_actions=actions)
        ended, sums = threading.Event(), [0]
        watch = threading.Thread(target=_watch, args=(child, ended, sums))
        watch.start()
        _, status, usage = os.wait4(child, 0)
        seconds = time.perf_counter() - start
        ended.set()
        watch.join()
    if status:
        sys.exit(f"{' '.join(command)}: exit status {os.waitstatus_to_exitcode(status)}")
    return seconds, max(usage.ru_maxrss / 1000, max(sums) / 1e6)


def _watch(process: int, ended: threading.Event, sums: list[int]) -> None:
    """Append what a process and its children hold together, again and again until it has ended."""
    while not ended.wait(_INTERVAL):
        sums.append(_together(process))


def _together(process: int) -> int:
    """Bytes; 0 without children, which the kernel's account of the process covers."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        return sum(map(_resident, [str(process), *children])) if children else 0
    except OSError:  # gone meanwhile, or a system without /proc
        return 0


def _resident(process: str) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
