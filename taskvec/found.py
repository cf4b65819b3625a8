"""What lies at a path where a `.lota` file is expected."""

from __future__ import annotations

import stat
from pathlib import Path

from .errors import UsageError


def check_lota(path: Path) -> None:
    """Say what lies at a path that cannot be a `.lota` file, and what to do with it.

    Raises:
        UsageError: It is a folder, a device or a pipe, or by its name a merge recipe. A path that is not there, and a
            file that holds something else, are left to the reader.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    pack = f"pack what it changed first (taskvec pack BASE {path} -o NAME.lota), or list it in a merge recipe"
    if stat.S_ISDIR(mode):
        if any(path.glob("*.safetensors")):
            raise UsageError(f"{path} is a model folder where a .lota file is expected: {pack}")
        raise UsageError(f"{path} is a folder where a .lota file is expected, and holds no model")
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path} is no regular file; a .lota file is expected")
    if path.suffix in (".yaml", ".yml"):
        raise UsageError(f"{path} is a YAML file where a .lota file is expected: taskvec merge --recipe {path}")
    if path.suffix == ".safetensors" and not _is_described(path):
        raise UsageError(f"{path} is a .safetensors checkpoint where a .lota file is expected: {pack}")


def _is_described(path: Path) -> bool:
    """Whether the file begins as `.lota` files do, whatever its name: the description is in its header."""
    with open(path, "rb") as file:
        start = file.read(1 << 16)
    return b'"taskvec"' in start
