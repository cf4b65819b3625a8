"""Locks that say that a file or folder is in use, until the process that holds them lets go or dies."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# descriptors of the locks that this process holds
_open: set[int] = set()


def _close_inherited() -> None:
    # a lock lasts as long as one process has the descriptor open: a worker must not outlive its parent's lock
    while _open:
        os.close(_open.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


def _flock(descriptor: int) -> None:
    """Take the lock of an open file or folder. Raises BlockingIOError where another process has it."""
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Lock:
    """The lock of a file or folder that is there.

    is_held: False where the file system has no locks, as Lustre and some FUSE file systems; nothing is known then.
    Raises BlockingIOError where another has the lock.
    """

    def __init__(self, path: Path) -> None:
        self.is_held = False
        self._descriptor: int | None = None
        if sys.platform == "win32":  # a folder cannot be opened there
            return
        # a FIFO would wait for a writer
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        _open.add(self._descriptor)
        try:
            _flock(self._descriptor)
            self.is_held = True
        except BlockingIOError:
            self.release()
            raise
        except OSError:
            # ENOLCK, EOPNOTSUPP, ENOSYS, EINVAL; EBADF on NFS, which locks only what is open for writing
            pass

    def is_of(self, path: Path) -> bool:
        """Whether what was locked still has that name: it may have been removed before the lock was there."""
        try:
            return self._descriptor is None or os.path.samestat(os.fstat(self._descriptor), os.stat(path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let go."""
        if self._descriptor in _open:  # not so in a process that was forked
            _open.discard(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = None
