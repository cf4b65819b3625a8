"""Folders of resumable work, with a record of the request so that only the same request continues in them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from taskvec_formats.system.atomic import atomic_file
from taskvec_formats.system.locks import Lock

from .errors import ResumeError

RECORD = "run.json"


Folder = TypeVar("Folder", bound="RecordedFolder")


class RecordedFolder:
    """A folder of resumable work that contains a record, `run.json`, which is written before anything else.

    The folder is locked, from the time that it exists until the `with` block or the process ends, so that only one
    process works in it.

    Args:
        path: The folder; it need not exist. None keeps nothing.
        kind: The kind of work. A folder of another kind is not modified.
        record: The parameters that identify this run, as JSON.
        resume: Whether to continue with the content of the folder. If False, `begin` removes it, even if it belongs to
            another run.
        beside: Names of files that may exist before the record does.

    Attributes:
        path: The folder, or None.
        is_stale: Whether `begin` will remove the content of the folder.

    Raises:
        ResumeError: The folder is in use, is of another kind, or contains files but no record; or, with `resume`, it
            belongs to another run.
    """

    def __init__(
        self,
        path: Path | None,
        kind: str,
        record: Mapping[str, Any],
        *,
        resume: bool = True,
        beside: Collection[str] = (),
    ) -> None:
        self.path = path
        self.is_stale = not resume
        self._kind = kind
        self._beside = beside
        self._record = {"kind": kind, **json.loads(json.dumps(record))}
        self._lock: Lock | None = None
        if path is not None and os.path.lexists(path):
            with suppress(FileNotFoundError):  # another run has just ended and removed it
                self._take(path)

    def _take(self, path: Path) -> None:
        """Lock the folder, and check that its content may be continued or removed."""
        self._lock = _locked(path)
        try:
            found = _read(path, self._kind, self._beside)
            if found is not None and not self.is_stale:
                _compare(path, self._kind, found, self._record)
        except BaseException:
            self._release()
            raise

    def begin(self) -> Path | None:
        """Create the folder and its record, and remove content that is not continued.

        Returns:
            The folder; None if nothing is kept.
        """
        if self.path is None:
            return None
        while self._lock is None:
            self.path.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                self._take(self.path)
        if self.is_stale:
            # the record is removed last: without it, nobody could tell what the other files belong to
            for entry in self.path.iterdir():
                if entry.name != RECORD:
                    _remove(entry)
        if self.is_stale or not (self.path / RECORD).exists():
            with atomic_file(self.path / RECORD) as temporary:
                temporary.write_text(json.dumps(self._record, indent=1) + "\n", encoding="utf-8")
        self.is_stale = False
        return self.path

    def remove(self) -> None:
        """Remove the folder, if this run has created or found it."""
        if self.path is not None and self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self: Folder) -> Folder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()


def holds_work(path: Path, kind: str) -> bool:
    """Return whether a folder contains unfinished work of a kind, for callers that need to know it early.

    Args:
        path: The folder; it need not exist.
        kind: The kind of work.

    Raises:
        ResumeError: The folder is in use, or is of another kind.
    """
    if not os.path.lexists(path):
        return False
    try:
        lock = _locked(path)
    except FileNotFoundError:
        return False
    try:
        _read(path, kind, ())
    finally:
        lock.release()
    return True


def remove_work(path: Path) -> None:
    """Remove a folder of finished work, unless another process is working in it."""
    try:
        lock = Lock(path)
    except (FileNotFoundError, BlockingIOError):
        return
    try:
        shutil.rmtree(path, ignore_errors=True)
    finally:
        lock.release()


def _locked(path: Path) -> Lock:
    """Lock a folder.

    Raises:
        ResumeError: The folder is in use, or is not a folder.
        FileNotFoundError: The folder has just been removed.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ResumeError(f"{path} is not a folder of unfinished work")
    try:
        lock = Lock(path)
    except BlockingIOError:
        raise ResumeError(f"{path} is in use by another process") from None
    if not lock.is_of(path):
        lock.release()
        raise FileNotFoundError(path)
    return lock


def _read(path: Path, kind: str, beside: Collection[str]) -> dict[str, Any] | None:
    """Return the record in a folder, or None if the folder is empty.

    Raises:
        ResumeError: The folder is not one of that kind of work.
    """
    try:
        found = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        # a run that was killed while it wrote the record leaves a file with a temporary name
        if any(not name.startswith(f".{RECORD}.") and name not in beside for name in os.listdir(path)):
            raise ResumeError(f"{path} contains files, but no record of the run that they belong to") from None
        return None
    except (ValueError, RecursionError):
        raise ResumeError(f"{path / RECORD} is not the record of a run") from None
    if not isinstance(found, dict) or found.get("kind") != kind:
        raise ResumeError(f"{path / RECORD} is not the record of a {kind}")
    return found


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _compare(path: Path, kind: str, found: Any, record: Any) -> None:
    """Raise ResumeError at the first item in which two records differ, and name the item."""
    if difference := first_difference(found, record):
        what, there, here = difference
        raise ResumeError(f"{path} belongs to another {kind}: {what} is {there} there, but {here} here")


def first_difference(found: Any, record: Any, what: str = "") -> tuple[str, Any, Any] | None:
    """Return the first item in which two records differ.

    Args:
        found: A record, as JSON.
        record: Another one.
        what: The name of the item that they are.

    Returns:
        The name of the item and its two values; None if the records are equal.
    """
    if not (isinstance(found, dict) and isinstance(record, dict)):
        return None if found == record else (what, found, record)
    for key in sorted(found.keys() | record.keys()):
        if difference := first_difference(found.get(key), record.get(key), f"{what}.{key}" if what else key):
            return difference
    return None
