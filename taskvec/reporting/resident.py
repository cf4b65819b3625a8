"""The memory of this process. This module imports nothing slow."""

from __future__ import annotations

import os


def resident() -> int | None:
    """Return the resident memory of this process in bytes, or None if the system does not report it."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            pages = int(file.read().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
