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
        ended, seen = threading.Event(), [0]
        watch = threading.Thread(target=_watch, args=(child, ended, seen))
        watch.start()
        _, status, usage = os.wait4(child, 0)
        seconds = time.perf_counter() - start
        ended.set()
        watch.join()
    if status:
        sys.exit(f"{' '.join(command)}: exit status {os.waitstatus_to_exitcode(status)}")
    # without /proc there is only the account of the process that was waited for, which begins with this one's memory
    return seconds, max(seen) / 1e6 or usage.ru_maxrss / 1000


def _watch(process: int, ended: threading.Event, seen: list[int]) -> None:
    """Append the bytes that a process and its children hold, again and again until it has ended."""
    while not ended.wait(_INTERVAL):
        seen.append(_held(process))


def _held(process: int) -> int:
    """Of one process alone the most that it ever held, of several what they hold now."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        if children:
            return sum(_status(name, "VmRSS") for name in [str(process), *children])
        return _status(str(process), "VmHWM")
    except OSError:  # gone meanwhile, or a system without /proc
        return 0


def _status(process: str, key: str) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)
