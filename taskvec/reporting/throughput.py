"""The speed of reading, hashing or writing, for progress reports."""

from __future__ import annotations

import time
from collections.abc import Callable

from taskvec_formats import Checkpoint

from .progress import Progress


class Throughput:
    """Describes how many bytes per second have been processed since it was made.

    Args:
        clock: Returns the time in seconds, from any origin.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._bytes = 0

    def after(self, size: int) -> str:
        """Count more bytes, and return the mean speed so far, such as "812 MB/s"; "" at the start.

        Args:
            size: The number of bytes that were processed since the last call.
        """
        self._bytes += size
        seconds = self._clock() - self._began
        return f"{self._bytes / seconds / 1e6:,.0f} MB/s" if self._bytes and seconds > 0 else ""


def hashed(checkpoint: Checkpoint, role: str, progress: Progress) -> dict[str, str]:
    """Return the digests of all tensors of a checkpoint, as `Checkpoint.digests`, and report progress.

    Args:
        checkpoint: The checkpoint.
        role: What it is, for the name of the stage, such as "base".
        progress: Called for every tensor.
    """
    rate, sizes = Throughput(), iter(bytes_of(checkpoint, name) for name in checkpoint.tensors)
    return checkpoint.digests(lambda done, total: progress(f"hashing {role}", done, total, rate.after(next(sizes))))


def bytes_of(checkpoint: Checkpoint, name: str) -> int:
    """Return the size of a tensor in bytes; 0 if the checkpoint has no such tensor."""
    info = checkpoint.tensors.get(name)
    return 0 if info is None else info.stop - info.start
