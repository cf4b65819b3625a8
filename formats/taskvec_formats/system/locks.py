"""Locks that mark a file or folder as in use until the process that holds them releases them or dies."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# file descriptors of the locks that this process holds
_open: set[int] = set()


def _close_inherited() -> None:
    # a lock is held while any process has the descriptor open, so a worker must not keep its parent's lock
    while _open:
        os.close(_open.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


def _flock(descriptor: int) -> None:
    """Lock an open file or folder. Raises BlockingIOError if another process holds the lock."""
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Lock:
    """The lock of an existing file or folder.

    Args:
        path: The file or folder.

    Attributes:
        is_held: Whether the lock is held. False if the file system does not support locks, as with Lustre and some FUSE
            file systems; whether the file is in use is then unknown.

    Raises:
        BlockingIOError: Another process holds the lock.
    """

    def __init__(self, path: Path) -> None:
        self.is_held = False
        self._descriptor: int | None = None
        if sys.platform == "win32":  # folders cannot be opened on Windows
            return
        # without O_NONBLOCK, opening a FIFO blocks until it has a writer
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        _open.add(self._descriptor)
        try:
            _flock(self._descriptor)
            self.is_held = True
        except BlockingIOError:
            self.release()
            raise
        except OSError:
            # no locks: ENOLCK, EOPNOTSUPP, ENOSYS, EINVAL; EBADF on NFS, which locks only files open for writing
            pass

    def is_of(self, path: Path) -> bool:
        """Return whether `path` is still the locked file: it may have been removed before it was locked.

        Args:
            path: The path given to the constructor.
        """
        try:
            return self._descriptor is None or os.path.samestat(os.fstat(self._descriptor), os.stat(path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Release the lock."""
        if self._descriptor in _open:  # a forked process has closed it already
            _open.discard(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = None
