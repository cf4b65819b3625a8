"""Output files and folders that appear under their final name only when they are complete and synced to disk."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .locks import Lock

# number of bytes by which the temporary name .NAME.xxxxxxxx.part is longer than NAME
SPARE = len("..xxxxxxxx.part")
_MINUTE = 60.0
# ignored errors: the file system cannot sync a file or folder, or a folder is writable but not readable
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES}


def _sync(path: Path) -> None:
    """Wait until a file or folder is written to disk, if the file system supports this."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to an OSError that names no file, for example one from writing to a full disk.

    Args:
        path: File to name.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _default_mode(kind: int) -> int:
    # mkstemp and mkdtemp create private entries; outputs get the mode that open() and mkdir() would give
    umask = os.umask(0)
    os.umask(umask)
    return kind & ~umask


@contextmanager
def _held(temporary: Path) -> Iterator[None]:
    """Mark a temporary file or folder as in use, and remove those next to it whose writer was killed."""
    lock = Lock(temporary)
    try:
        name = temporary.name.rsplit(".", 2)[0]
        for path in map(Path, glob.glob(f"{glob.escape(str(temporary.with_name(name)))}.*.part")):
            _remove_if_abandoned(path)
        yield
    finally:
        lock.release()


def _remove_if_abandoned(path: Path) -> None:
    try:
        # a new one may not be locked yet
        if time.time() - path.stat().st_mtime < _MINUTE:
            return
        lock = Lock(path)
    except OSError:
        return  # in use, or removed
    try:
        if lock.is_held:
            _remove(path)
    finally:
        lock.release()


def _appeared(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, "appeared in the meantime", str(path))


@contextmanager
def atomic_file(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to `path`, and rename it to `path` on success.

    The file is synced to disk before it is renamed. After an error the temporary file is removed.

    Args:
        path: Final path of the file.
        replace: Whether an existing file is replaced. If False, an existing file is left unchanged.

    Yields:
        Path of the temporary file.

    Raises:
        FileExistsError: At the end, if `path` exists and `replace` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with naming(path), _held(temporary):
            yield temporary
            os.chmod(temporary, _default_mode(0o666))
            _sync(temporary)
            if replace:
                os.replace(temporary, path)
            else:
                _put_new_file(temporary, path)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _put_new_file(temporary: Path, path: Path) -> None:
    """Rename a file to a path that must not exist. Raises FileExistsError."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise _appeared(path) from None
    except OSError:  # no hard links on this file system: check and rename in two steps
        if os.path.lexists(path):
            raise _appeared(path) from None
        os.rename(temporary, path)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one atomic step; return False if the system cannot."""
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
def atomic_directory(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary folder next to `path`, and rename it to `path` on success.

    Its files are synced to disk before it is renamed. After an error the temporary folder is removed.

    Args:
        path: Final path of the folder.
        replace: Whether an existing folder or file is replaced once the new folder is complete; after an error it is
            unchanged. If False, only an empty folder is replaced.

    Yields:
        Path of the temporary folder.

    Raises:
        FileExistsError: At the end, if `path` exists, is not an empty folder, and `replace` is False.
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
            if not replace:
                _put_new_folder(temporary, path)
            # rename() cannot replace a folder that is not empty
            elif not os.path.lexists(path):
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


def _put_new_folder(temporary: Path, path: Path) -> None:
    """Rename a folder to a path that must not exist, or must be an empty folder. Raises FileExistsError."""
    try:
        os.rename(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _appeared(path) from None
        raise
