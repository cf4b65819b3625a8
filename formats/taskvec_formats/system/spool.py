"""Temporary files without a name, to which workers append and from which their parent copies."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import BinaryIO

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Piece:
    """A range of bytes of an open file. It can be sent between a process and its forks.

    Attributes:
        file: File descriptor.
        start: First byte.
        length: Number of bytes.
    """

    file: int
    start: int
    length: int

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes in parts."""
        start, stop = self.start, self.start + self.length
        while start < stop:
            part = os.pread(self.file, min(stop - start, _CHUNK), start)
            if not part:
                raise OSError(0, "a temporary file ends early")
            yield part
            start += len(part)


class Spools:
    """Temporary files that vanish when they are closed, or when the process ends in any way.

    Each worker appends to a file of its own. Threads may share one.

    Args:
        folder: Folder on the file system to use. It is made if it is missing.
        count: Number of files.
    """

    def __init__(self, folder: Path, count: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._ends = [0] * count
        self._locks = [Lock() for _ in range(count)]
        with ExitStack() as opening:
            self._files: list[BinaryIO] = [
                opening.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0)) for _ in range(count)
            ]
            self._open = opening.pop_all()

    def __enter__(self) -> Spools:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def append(self, number: int, data: bytes) -> Piece:
        """Append to a file.

        Args:
            number: Number of the file. Two processes must not append to the same one.
            data: The bytes.
        """
        file = self._files[number].fileno()
        with self._locks[number]:
            start, view = self._ends[number], memoryview(data)
            while view:
                view = view[os.pwrite(file, view, self._ends[number]) :]
                self._ends[number] = start + len(data) - len(view)
        return Piece(file, start, len(data))
