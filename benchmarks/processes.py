"""Measurement of whole processes: wall time and peak memory, including start-up and imports."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

_INTERVAL = 0.02  # seconds between two samples of a process and its children


def measure(command: list[str]) -> tuple[float, float]:
    """Run a command and measure it.

    If the command has several processes, the memory is the peak of their sum, with shared pages counted in each.

    Args:
        command: The command and its arguments.

    Returns:
        Wall time in seconds and peak resident memory in MB.
    """
    with open(os.devnull, "w") as null:
        start = time.perf_counter()
        actions = [(os.POSIX_SPAWN_DUP2, null.fileno(), 1)]
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
    # without /proc only ru_maxrss is available, which is never below the memory of this process
    return seconds, max(seen) / 1e6 or usage.ru_maxrss / 1000


def _watch(process: int, ended: threading.Event, seen: list[int]) -> None:
    """Append the memory of a process and its children, in bytes, repeatedly until it has ended."""
    while not ended.wait(_INTERVAL):
        seen.append(_resident(process))


def _resident(process: int) -> int:
    """The peak memory of a process without children, or the current memory of one with its children, in bytes."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        if children:
            return sum(_status(name, "VmRSS") for name in [str(process), *children])
        return _status(str(process), "VmHWM")
    except OSError:  # the process has ended, or the system has no /proc
        return 0


def _status(process: str, key: str) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)
