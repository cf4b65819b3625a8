"""Results on disk: one JSON line per trained cell, and one per evaluation on a test part. Lines are only appended."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Cell = tuple[str, str, int]  # key of the spec, setting as JSON, seed


class StoreError(Exception):
    """Results cannot be used."""


class Store:
    """Results of one world. Several processes may add to the same file.

    Args:
        path: The file. It is created if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heads: list[Record] = []
        self._cells: dict[Cell, Record] = {}
        self._tests: dict[tuple[Cell, str], Record] = {}
        self._read = 0
        self.refresh()

    def refresh(self) -> None:
        """Read the lines that were added since the last call. A last line without a line break is ignored."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            record: Record = json.loads(line)
            if "base" in record:
                self.heads.append(record)
                continue
            cell = (record["key"], json.dumps(record["setting"]), record["seed"])
            if record.get("split") == "test":
                self._tests[cell, record["task"]] = record
            else:
                self._cells[cell] = record

    def add(self, record: Record) -> None:
        """Append a record."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            content = file.read()
            if content and not content.endswith(b"\n"):  # a process was killed while it wrote
                file.truncate(content.rfind(b"\n") + 1)
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.refresh()

    def begin(self, head: Record) -> int:
        """Add a description of the base and the packages unless it is there already.

        Returns:
            Its number.

        Raises:
            StoreError: The results are of another base.
        """
        if self.heads and self.heads[0]["base"] != head["base"]:
            raise StoreError(
                f"{self.path} contains results of a base with digest {self.heads[0]['base'][:12]}, but the base here "
                f"has {head['base'][:12]}: give another file for the results"
            )
        if head not in self.heads:
            self.add(head)
        return self.heads.index(head)

    def cell(self, cell: Cell) -> Record | None:
        """The record of a trained cell, with its validation scores."""
        return self._cells.get(cell)

    def test(self, cell: Cell, task: str) -> Record | None:
        """The scores of a cell on the test part of a task."""
        return self._tests.get((cell, task))

    def knows(self, key: str) -> bool:
        """Whether any cell of a spec is in the results."""
        return any(known == key for known, _, _ in self._cells)

    @property
    def cells(self) -> dict[Cell, Record]:
        """All trained cells."""
        return dict(self._cells)

    @property
    def tests(self) -> dict[tuple[Cell, str], Record]:
        """All scores on test parts."""
        return dict(self._tests)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within the block, no other process holds the lock of this name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
