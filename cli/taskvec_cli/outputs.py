"""What the commands that write share: the name of an output, and the work that one before left unfinished."""

from pathlib import Path
from typing import Annotated, Any

import typer


def file_name(text: str) -> Path:
    """A file to write, from the text that was typed: as a path it would lose the slash of a folder."""
    from taskvec.errors import UsageError

    if not text or text.endswith("/"):
        raise UsageError(f"the output is a file, which needs a name, found {text!r}")
    return Path(text)


def folder_name(text: str) -> Path:
    """A folder to write, from the text that was typed: as a path no text would be the current folder."""
    from taskvec.errors import UsageError

    if not text:
        raise UsageError(f"the output is a folder, which needs a name, found {text!r}")
    return Path(text)


# the options of a file that is going to be written
FILE: dict[str, Any] = {"parser": file_name, "metavar": "PATH"}
LotaFile = Annotated[Path, typer.Option("-o", "--output", help="The .lota file to write.", show_default=False, **FILE)]
ModelFolder = Annotated[
    Path,
    typer.Option(
        "-o", "--output", help="The model folder to write.", metavar="PATH", parser=folder_name, show_default=False
    ),
]


def check_unfinished(folder: Path, kind: str, *, resume: bool, force: bool) -> None:
    """Refuse, before any work, a folder of unfinished work that is in use, or of which it is not said what to do.

    Raises ResumeError, also for a folder that holds something else, and UsageError.
    """
    from taskvec.errors import UsageError
    from taskvec.record import holds_work

    if holds_work(folder, kind) and not resume and not force:
        raise UsageError(f"{folder} holds an unfinished {kind}: --resume goes on with it, --force starts anew")
