"""Paths as they are typed: a Path would lose the slash at the end of a folder's name."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer


def is_folder_name(text: str) -> bool:
    """Whether a path says that it is a folder's."""
    return text.endswith(tuple(filter(None, (os.sep, os.altsep))))


def file_path(text: str) -> Path:
    """The path of a file that is going to be written. Raises UsageError for a folder's."""
    if is_folder_name(text):
        from taskvec.errors import UsageError

        raise UsageError(f"{text} is the name of a folder; the output is a file")
    return Path(text)


# options of a file that is going to be written
FILE: dict[str, Any] = {"parser": file_path, "metavar": "<path>"}
LotaOutput = Annotated[
    Path, typer.Option("-o", "--output", help="The .lota file to write.", show_default=False, **FILE)
]
