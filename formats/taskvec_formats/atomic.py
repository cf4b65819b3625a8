"""Outputs that appear under their final name complete and synced, or not at all."""

from __future__ import annotations

import glob
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put `path` into an OSError that names no file, as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _default_mode(kind: int) -> int:
    # mkstemp and mkdtemp create private entries; an output gets what open() and mkdir() would have given it
    umask = os.umask(0)
    os.umask(umask)
    return kind & ~umask


_MINUTE = 60.0


@contextmanager
def _held(temporary: Path) -> Iterator[None]:
    """Mark a temporary file or folder as in use, and remove those beside it whose writer was killed."""
    if sys.platform == "win32":  # no locks on folders there
        yield
        return
    import fcntl

    handle = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        name = temporary.name.rsplit(".", 2)[0]
        for path in map(Path, glob.glob(f"{glob.escape(str(temporary.with_name(name)))}.*.part")):
            _remove_if_abandoned(path)
        yield
    finally:
        os.close(handle)


def _remove_if_abandoned(path: Path) -> None:
    import fcntl

    try:
        # whoever has just made one may not have locked it yet
        if time.time() - path.stat().st_mtime < _MINUTE:
            return
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path)
        finally:
            os.close(handle)
    except OSError:
        return  # in use, or gone


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it and rename it over `path`, on any error remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with naming(path), _held(temporary):
            yield temporary
            os.chmod(temporary, _default_mode(0o666))
            _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    import ctypes

    try:
        rename = ctypes.CDLL(None).renameat2
    except AttributeError:  # an old C library
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success sync its files and rename it to `path`.

    A folder already at `path` is replaced only once the new one is complete; on any error it stays as it was.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    retired = temporary.with_suffix(".old")
    try:
        with naming(path), _held(temporary):
            yield temporary
            os.chmod(temporary, _default_mode(0o777))
            for file in temporary.rglob("*"):
                _sync(file)
            _sync(temporary)
        # rename() cannot replace a folder with content
        if not os.path.lexists(path):
            os.rename(temporary, path)
        elif not _exchange(temporary, path):
            os.rename(path, retired)
            os.rename(temporary, path)
        _sync(path.parent)
    except BaseException:
        if os.path.lexists(retired) and not os.path.lexists(path):
            os.rename(retired, path)
        raise
    finally:
        _remove(temporary)
        if os.path.lexists(path):
            _remove(retired)
