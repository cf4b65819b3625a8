"""Opening of `.lota` files, with helpful errors if the path is something else."""

from __future__ import annotations

import stat
from pathlib import Path

from taskvec_formats import LotaReader
from taskvec_formats.errors import NotLotaError
from taskvec_formats.file_names import GGUF

from ..errors import UsageError


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
        raise UsageError(f"{path}: no such file") from None
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
