"""The guard in front of every output, for Python and the command line alike.

All is checked before any work: whether something is there already, whether it may be replaced, whether the output could
be written at all, and that it is not one of the inputs. The last step of writing does not replace what has appeared
since (`taskvec_formats.atomic`); `appearing` says so.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from taskvec_formats.atomic import SPARE

from .errors import OutputExistsError, UsageError

_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
# where links lead to what a process has open, so that replacing them would take it away from all others
_SYSTEM = (Path("/dev"), Path("/proc"))
_MOST_LINKS = 40  # Linux follows no more


def check_file(path: str | Path, *, force: bool = False, inputs: Iterable[Path] = ()) -> Path:
    """Refuse an output file that cannot be written, or that would replace what it must not; return its path.

    Args:
        path: The file; a text that ends with a slash names a folder.
        force: Whether a file that exists is to be replaced.
        inputs: The files and folders that are read. None of them is replaced, whatever `force` is.

    Raises:
        OutputExistsError: The file exists and `force` is not given.
        UsageError: The output is a folder, a device, a FIFO, a socket or a link to nothing; it is an input; its name
            is too long; nothing can be written to its folder.
    """
    text, path = os.fspath(path), _named(path)
    if text.endswith(os.sep) or os.path.isdir(path):
        raise UsageError(f"{text} is a folder; the output is a file")
    _check_plain(path)
    check_apart(path, inputs)
    if os.path.exists(path) and not force:
        raise OutputExistsError(f"{path} exists already")
    _check_room(path)
    return path


def check_folder(path: str | Path, *, force: bool = False, inputs: Iterable[Path] = ()) -> Path:
    """The same for a model folder. Only a folder that holds a model, and nothing but plain files, is ever replaced.

    Args:
        path: The folder; an empty one may be there.
        force: Whether a model folder that exists is to be replaced.
        inputs: As in `check_file`; none of them may lie in the folder either.

    Raises:
        OutputExistsError: The folder holds a model and `force` is not given.
        UsageError: The output is a file, or a folder that holds something else than a model; or as in `check_file`.
    """
    path = _named(path)
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
    """Refuse an output that is one of the inputs or a folder that holds one; links are followed.

    Raises:
        UsageError: It is, or does.
    """
    try:
        own = os.stat(path)
    except OSError:
        return  # nothing there

    def is_own(place: Path) -> bool:
        try:
            return os.path.samestat(os.stat(place), own)
        except OSError:
            return False

    seen: set[Path] = set()
    for source in dict.fromkeys(inputs):
        if is_own(source):
            led = "" if os.path.abspath(source) == os.path.abspath(path) else f" ({source})"
            raise UsageError(f"{path} is an input{led}: the output needs a place of its own")
        for folder in _folders(source):
            if folder not in seen and is_own(folder):
                raise UsageError(f"{path} holds the input {source}: the output needs a place of its own")
            seen.add(folder)


def check_distinct(*outputs: Path | None) -> None:
    """Refuse two outputs of one command that are one path.

    Raises:
        UsageError: They are.
    """
    known: dict[Path, Path] = {}
    for path in outputs:
        if path is not None and known.setdefault(path.resolve(), path) is not path:
            raise UsageError(f"{path} is named for two outputs: each needs a place of its own")


@contextmanager
def appearing(path: Path) -> Iterator[None]:
    """Say that another has written an output while this one was made.

    Raises:
        OutputExistsError: In place of the FileExistsError of that output.
    """
    try:
        yield
    except FileExistsError as error:
        if error.filename != str(path.absolute()) and error.filename != str(path):
            raise
        raise OutputExistsError(f"{path} appeared in the meantime") from None


def _named(path: str | Path) -> Path:
    text = os.fspath(path)
    if not text:
        raise UsageError("the output has no name")
    if "\0" in text:
        raise UsageError(f"{text!r} is no name of a file: it holds a zero byte")
    return Path(path)


def _check_plain(path: Path) -> None:
    """Refuse what is there and neither a file nor a folder."""
    for link in _links(path):
        if any(folder in link.parents for folder in _SYSTEM):
            raise UsageError(f"{path} is a device; the output needs a name of its own")
    try:
        mode = os.stat(path).st_mode
    except OSError:
        if os.path.islink(path):
            raise UsageError(f"{path} is a link to {os.readlink(path)}, which is not there") from None
        return
    if (kind := _KINDS.get(stat.S_IFMT(mode))) is not None:
        raise UsageError(f"{path} is {kind}; the output needs a name of its own")


def _check_model(path: Path, content: list[Path]) -> None:
    """Refuse to replace a folder that is no model, or that holds more than one."""
    if not any(file.suffix == ".safetensors" for file in content):
        raise UsageError(f"{path} exists and holds no model; it will not be replaced")
    for file in content:
        if file.is_dir() and not _is_cache(file):
            raise UsageError(f"{path} holds the folder {file.name!r}, which would be lost; it will not be replaced")
        if not file.is_dir() and not file.is_file():
            raise UsageError(f"{path} holds {file.name!r}, which is no plain file; it will not be replaced")


def _is_cache(folder: Path) -> bool:
    """Whether it is what huggingface_hub keeps beside downloads and uploads: notes on them, which can be made again."""
    return folder.name == ".cache" and [entry.name for entry in folder.iterdir()] == ["huggingface"]


def _check_room(path: Path) -> None:
    """Refuse a place where nothing can be written."""
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
    """Refuse names that are too long for the file system of a folder that is there."""
    most = os.pathconf(folder, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    *parents, name = path.relative_to(folder).parts
    for part, limit in [(name, most - SPARE), *((parent, most) for parent in parents)]:
        if len(os.fsencode(part)) > limit:
            raise UsageError(f"the name {part:.40}… is too long: the file system takes {limit} bytes for an output")


def _links(path: Path) -> Iterator[Path]:
    """The links on the way from a path to what it names; the folders above each are resolved."""
    for _ in range(_MOST_LINKS):
        path = Path(os.path.realpath(path.parent)) / path.name
        if not os.path.islink(path):
            return
        yield path
        path = path.parent / os.readlink(path)


def _folders(path: Path) -> Iterator[Path]:
    """The folders above a path, and above each link on the way to what it names."""
    for place in (Path(os.path.realpath(path.parent)) / path.name, *_links(path), Path(os.path.realpath(path))):
        yield from place.parents
