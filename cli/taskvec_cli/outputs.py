"""What the commands that write share: names and sizes of outputs, and the work that one before left unfinished."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

_SIZE = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,12})?)\s*([kKMGT])(i?)B?")


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
# what a command that reads examples takes
DATA = "JSON lines, JSON, CSV or Parquet; a folder of such files; or a Hub id, org/name:split."
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
    from taskvec.resume import holds_work

    if holds_work(folder, kind) and not resume and not force:
        raise UsageError(f"{folder} holds an unfinished {kind}: --resume goes on with it, --force starts anew")


def parse_size(option: str, text: str) -> int:
    """Bytes from 500MB or 2GB, powers of ten, or 500MiB, powers of two, as transformers reads them."""
    from taskvec.errors import UsageError

    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise UsageError(f"{option} is a size such as 500MB or 2GB, found {text!r:.80}: a number needs a unit")
    thousand = 1024 if found[3] else 1000
    return int(float(found[1]) * thousand ** (1 + "KMGT".index(found[2].upper())))
