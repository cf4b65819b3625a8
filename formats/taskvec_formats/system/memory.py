"""Settings of the C library's allocator (glibc). Elsewhere, these functions do nothing."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # numbers of mallopt


@cache
def _library() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") else None


def keep_freed_memory() -> None:
    """Keep freed memory in this process, since the system would have to zero new pages for each large block.

    All threads share one area. Each may otherwise get an area of its own, which keeps what the thread freed after its
    end, and which consists of pieces of at most 64 MB that are given back when they are empty.
    """
    if (library := _library()) is not None:
        for parameter in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            library.mallopt(parameter, 1 << 30)
        library.mallopt(_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Give large blocks back to the system as soon as they are freed, from now on. This undoes `keep_freed_memory`.

    The opposite is quicker, but blocks of many sizes that come and go leave gaps that are never used again.
    """
    if (library := _library()) is not None:
        library.mallopt(_MMAP_THRESHOLD, 1 << 20)
        library.mallopt(_TRIM_THRESHOLD, 1 << 20)


def release_freed_memory() -> None:
    """Give freed memory back to the system."""
    if (library := _library()) is not None:
        library.malloc_trim(0)
