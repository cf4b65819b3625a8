"""Bytes that are read by position: those of a local file, or of any other place with the same interface."""

from __future__ import annotations

import os
import stat
import weakref
from pathlib import Path
from typing import Protocol

import numpy as np

from .errors import NotSafetensorsError


class Readable(Protocol):
    """A file whose bytes are read by position, such as a file on a server. Implementations are thread-safe.

    Attributes:
        name: Name for error messages.
        size: Size in bytes.
    """

    name: str
    size: int

    def read(self, start: int, stop: int) -> memoryview:
        """Read the bytes [start, stop).

        Args:
            start: First byte.
            stop: Byte after the last one, at most `size`.

        Returns:
            Exactly these bytes.

        Raises:
            FormatError: The file ends earlier, cannot be read, or was changed after it was opened. An implementation
                may raise errors of its own, for example if a server does not answer.
        """


class LocalFile:
    """A regular file of this machine. A file that is modified after it was opened is rejected.

    Args:
        path: Path of the file.

    Attributes:
        name: The path.
        size: Size in bytes.

    Raises:
        NotSafetensorsError: The path is not a readable regular file.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        try:
            # without O_NONBLOCK, opening a FIFO blocks until it has a writer
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except (OSError, ValueError) as error:  # ValueError if the path is invalid, e.g. contains NUL
            raise NotSafetensorsError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
        weakref.finalize(self, os.close, self._file)
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode):
            raise NotSafetensorsError(f"{path} is not a regular file")
        self.size = status.st_size
        self._written = status.st_mtime_ns

    def read(self, start: int, stop: int) -> memoryview:
        """Read the bytes [start, stop), as in `Readable`.

        Args:
            start: First byte.
            stop: Byte after the last one.

        Raises:
            NotSafetensorsError: The file ends earlier, cannot be read, or was changed after it was opened.
        """
        view, done = np.empty(stop - start, np.uint8).data, 0
        while done < len(view):
            try:
                count = os.preadv(self._file, [view[done:]], start + done)
            except OSError as error:
                raise NotSafetensorsError(f"{self.name} cannot be read ({error.strerror or error})") from None
            if not count:
                raise NotSafetensorsError(f"{self.name} ends at byte {start + done}: it was cut off while it was read")
            done += count
        if os.fstat(self._file).st_mtime_ns != self._written:
            raise NotSafetensorsError(f"{self.name} was changed while it was read")
        return view
