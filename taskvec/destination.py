"""Checks of output paths, used by every function and command that writes something.

All checks run before any work: whether the output exists, whether it may be replaced, whether it can be written at all,
and whether it is one of the inputs. The last step of writing does not replace an output that was created in the
meantime (`taskvec_formats.system.atomic`); `appearing` turns that into an error of this package.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from taskvec_formats.system.atomic import SPARE

from .arguments import path_of
from .errors import OutputExistsError, UsageError

_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
# links in these folders lead to open files of processes; replacing them would affect other processes
_SYSTEM = (Path("/dev"), Path("/proc"))
_MOST_LINKS = 40  # the limit of Linux


def check_file(path: str | os.PathLike[str], *, force: bool = False, inputs: Iterable[Path] = ()) -> Path:
    """Check that an output file can be written and does not replace anything it must not replace.

    Args:
        path: The file. A string that ends with a slash names a folder.
        force: Whether an existing file may be replaced.
        inputs: The files and folders that are read. They are never replaced, even with `force`.

    Returns:
        The path.

    Raises:
        OutputExistsError: The file exists and `force` is False.
        UsageError: The output is a folder, a device, a FIFO, a socket or a dangling link; it is an input; its name is
            too long; or its folder is not writable.
    """
    path, text = _named(path), os.fspath(path)
    if text.endswith(os.sep) or os.path.isdir(path):
        raise UsageError(f"{text} is a folder; the output is a file")
    _check_plain(path)
    check_apart(path, inputs)
    if os.path.exists(path) and not force:
        raise OutputExistsError(f"{path} exists already")
    _check_room(path)
    return path


def check_folder(path: str | os.PathLike[str], *, force: bool = False, inputs: Iterable[Path] = ()) -> Path:
    """Check that a model folder can be written and does not replace anything it must not replace.

    Only a folder that contains a model, and nothing but regular files, may be replaced.

    Args:
        path: The folder. It may exist if it is empty.
        force: Whether an existing model folder may be replaced.
        inputs: As in `check_file`. In addition, none of them may be inside the folder.

    Returns:
        The path.

    Raises:
        OutputExistsError: The folder contains a model and `force` is False.
        UsageError: The output is a file, a folder that contains something other than a model, or has a name that ends
            in .lota; or as in `check_file`.
    """
    path = _named(path)
    if path.suffix == ".lota":
        raise UsageError(f"{path}: a name that ends in .lota is for a task vector; the output is a model folder")
    _check_plain(path)
    if os.path.exists(path) and not os.path.isdir(path):
        raise UsageError(f"{path} is a file; the output is a folder")
    check_apart(path, inputs)
    if os.path.exists(path):
        if os.path.ismount(path):
            raise UsageError(f"{path} is a mount point, which cannot be replaced: name a folder in it")
        content = sorted(path.iterdir())
        if content:
            _check_model(path, content)
        if not force and (content or path.is_symlink()):
            raise OutputExistsError(f"{path} exists already")
    _check_room(path)
    return path


def check_apart(path: Path, inputs: Iterable[Path]) -> None:
    """Check that an output is neither an input nor a folder that contains one. Links are followed.

    Args:
        path: The output.
        inputs: The files and folders that are read.

    Raises:
        UsageError: The output is an input or contains one.
    """
    try:
        own = os.stat(path)
    except OSError:
        return  # it does not exist

    def is_own(place: Path) -> bool:
        try:
            return os.path.samestat(os.stat(place), own)
        except OSError:
            return False

    seen: set[Path] = set()
    for source in dict.fromkeys(inputs):
        if is_own(source):
            led = "" if os.path.abspath(source) == os.path.abspath(path) else f" ({source})"
            raise UsageError(f"{path} is an input{led}: choose another output path")
        for folder in _folders(source):
            if folder not in seen and is_own(folder):
                raise UsageError(f"{path} contains the input {source}: choose another output path")
            seen.add(folder)


def check_distinct(*outputs: Path | None) -> None:
    """Check that the outputs of one command have different paths.

    Args:
        *outputs: The paths; None is skipped.

    Raises:
        UsageError: Two paths are the same.
    """
    known: dict[Path, Path] = {}
    for path in outputs:
        if path is not None and known.setdefault(path.resolve(), path) is not path:
            raise UsageError(f"{path} is given for two outputs: choose two different paths")


@contextmanager
def appearing(path: Path) -> Iterator[None]:
    """Report an output that was created by someone else while this one was written.

    Args:
        path: The output.

    Raises:
        OutputExistsError: Replaces the FileExistsError for `path`.
    """
    try:
        yield
    except FileExistsError as error:
        if error.filename != str(path.absolute()) and error.filename != str(path):
            raise
        raise OutputExistsError(f"{path} appeared in the meantime") from None


def part_of(folder: Path) -> Path:
    """Return the folder for unfinished work on an output folder.

    Raises:
        UsageError: The output has no name of its own, as `.` and `/` have none.
    """
    if not folder.name:
        raise UsageError(f"{folder} cannot be replaced: name a folder in it")
    return folder.with_name(f"{folder.name}.part")


def _named(path: str | os.PathLike[str]) -> Path:
    if isinstance(path, str) and not path:
        raise UsageError("the output path is empty: expected the name of a file or folder")
    return path_of("the output", path)


def _check_plain(path: Path) -> None:
    """Refuse an existing path that is neither a file nor a folder."""
    for link in _links(path):
        if any(folder in link.parents for folder in _SYSTEM):
            raise UsageError(f"{path} is a device; choose another output path")
    try:
        mode = os.stat(path).st_mode
    except OSError:
        if os.path.islink(path):
            raise UsageError(f"{path} is a link to {os.readlink(path)}, which does not exist") from None
        return
    if (kind := _KINDS.get(stat.S_IFMT(mode))) is not None:
        raise UsageError(f"{path} is {kind}; choose another output path")


def _check_model(path: Path, content: list[Path]) -> None:
    """Refuse to replace a folder that contains no model, or more than a model."""
    if not any(file.suffix == ".safetensors" for file in content):
        raise UsageError(f"{path} exists and contains no model; it will not be replaced")
    for file in content:
        if file.is_dir() and not _is_cache(file):
            raise UsageError(f"{path} contains the folder {file.name!r}, which would be lost; it will not be replaced")
        if not file.is_dir() and not file.is_file():
            raise UsageError(f"{path} contains {file.name!r}, which is not a regular file; it will not be replaced")


def _is_cache(folder: Path) -> bool:
    """Return whether a folder is the metadata cache of huggingface_hub, which can be recreated."""
    return folder.name == ".cache" and [entry.name for entry in folder.iterdir()] == ["huggingface"]


def _check_room(path: Path) -> None:
    """Refuse a path whose folder is not writable."""
    path = path.absolute()
    folder = path.parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise UsageError(f"{path} cannot be written: {folder} is not a folder")
    _check_names(path, folder)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {folder}: {error.strerror}") from None


def _check_names(path: Path, folder: Path) -> None:
    """Refuse names that are too long for the file system of `folder`, which exists."""
    most = os.pathconf(folder, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    *parents, name = path.relative_to(folder).parts
    for part, limit in [(name, most - SPARE), *((parent, most) for parent in parents)]:
        if len(os.fsencode(part)) > limit:
            raise UsageError(f"the name {part:.40}… is too long: the file system allows {limit} bytes for an output")


def _links(path: Path) -> Iterator[Path]:
    """Yield the links between a path and its target; the folders above each link are resolved."""
    for _ in range(_MOST_LINKS):
        path = Path(os.path.realpath(path.parent)) / path.name
        if not os.path.islink(path):
            return
        yield path
        path = path.parent / os.readlink(path)


def _folders(path: Path) -> Iterator[Path]:
    """Yield the folders above a path, and above each link between the path and its target."""
    for place in (Path(os.path.realpath(path.parent)) / path.name, *_links(path), Path(os.path.realpath(path))):
        yield from place.parents
