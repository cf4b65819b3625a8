"""Opening of `.lota` files, local or on the Hub, with helpful errors if the path is something else."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

from taskvec_formats import LotaReader
from taskvec_formats.errors import NotLotaError
from taskvec_formats.file_names import GGUF

from ..arguments import path_of
from ..errors import UsageError
from ..hub.reference import reference_to, written
from ..hub.vectors import download as download_file
from ..hub.vectors import files_of, remote, vector_name


def open_vector(place: str | os.PathLike[str], *, download: bool = True) -> tuple[LotaReader, str]:
    """Open a `.lota` file by its path, or by its reference on the Hub.

    Args:
        place: The path, or `user/repo`, `user/repo/file.lota`, each with or without `@revision`.
        download: Whether a file of the Hub is downloaded to its cache. If False, what is read is fetched.

    Returns:
        The open file, and the name of the vector: the file name, on the Hub with the repository before it.

    Raises:
        UsageError: As in `open_lota`.
        HubError: The file cannot be found on the Hub, or cannot be read or stored.
        FormatError: The file is damaged.
    """
    path = path_of("path", place)
    reference = reference_to(place, file=True)
    if reference is None:
        return open_lota(path), path.name
    reference = vector_name(reference)
    found = download_file(reference) if download else remote(reference)
    reader = open_lota(found) if isinstance(found, Path) else LotaReader(found)
    return reader, f"{reference.repo}/{reference.file}"


def is_vector(place: str | os.PathLike[str]) -> bool:
    """Return whether a path or a reference is that of a `.lota` file rather than that of a model.

    Args:
        place: The path or the reference. That of a repository means a vector if it contains `.lota` files.

    Raises:
        UsageError: The repository contains both `.lota` files and a model.
        HubError: The Hub cannot be asked.
    """
    reference = reference_to(place, file=True)
    if reference is None:
        return os.fspath(place).endswith(".lota")
    if reference.file is not None:
        return True
    names = files_of(reference)
    vectors = [name for name in names if name.endswith(".lota")]
    if vectors and any(name.endswith(".safetensors") for name in names):
        named = replace(reference, file=min(vectors))
        raise UsageError(f"{reference} contains a model and .lota files: name a file, as in {named}")
    return bool(vectors)


def open_lota(path: Path) -> LotaReader:
    """Open a `.lota` file.

    Args:
        path: The file.

    Raises:
        UsageError: The path does not exist; is a folder, a device, a pipe or another safetensors file; or has the name
            of a merge recipe.
        FormatError: The file cannot be read, or is damaged.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{written(path)}: no such file") from None
    except (OSError, ValueError):
        return LotaReader(path)  # raises the error that explains it
    pack = "compute its difference from the base first (taskvec pack or taskvec.diff), or list it in a merge recipe"
    if stat.S_ISDIR(mode):
        if any(path.glob("*.safetensors")):
            raise UsageError(f"{path} is a model folder, not a .lota file: {pack}")
        raise UsageError(f"{path} is a folder, not a .lota file, and contains no model")
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path} is not a regular file; expected a .lota file")
    if path.suffix in (".yaml", ".yml"):
        raise UsageError(
            f"{path} is a YAML file, not a .lota file: a recipe is merged by taskvec merge --recipe {path}"
        )
    if path.suffix.lower() == GGUF:
        raise UsageError(f"{path} is a GGUF file, not a .lota file")
    try:
        return LotaReader(path)
    except NotLotaError as error:
        raise UsageError(f"{error}; if it is a checkpoint, {pack}") from None
