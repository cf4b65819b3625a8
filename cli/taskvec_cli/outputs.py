"""Options and checks that several commands share: output paths, sizes, and unfinished work."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

_SIZE = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,12})?)\s*([kKMGT])(i?)B?")


def file_name(text: str) -> Path:
    """Parse the name of an output file.

    A Path drops a trailing slash, so the check is made on the text.

    Raises:
        UsageError: If the text is empty or ends with a slash.
    """
    from taskvec.errors import UsageError

    if not text or text.endswith("/"):
        raise UsageError(f"the output is a file: expected a file name, found {text!r}")
    return Path(text)


def folder_name(text: str) -> Path:
    """Parse the name of an output folder.

    The Path of an empty text is the current folder, so the check is made on the text.

    Raises:
        UsageError: If the text is empty.
    """
    from taskvec.errors import UsageError

    if not text:
        raise UsageError(f"the output is a folder: expected a folder name, found {text!r}")
    return Path(text)


# keyword arguments of typer.Option for an output file
FILE: dict[str, Any] = {"parser": file_name, "metavar": "PATH"}
LotaFile = Annotated[Path, typer.Option("-o", "--output", help="The .lota file to write.", show_default=False, **FILE)]
ModelFolder = Annotated[
    Path,
    typer.Option(
        "-o", "--output", help="The model folder to write.", metavar="PATH", parser=folder_name, show_default=False
    ),
]


def _memory(text: str) -> int:
    """Parse `--max-memory`.

    Raises:
        UsageError: If the text is no size, or is too small.
    """
    from taskvec.errors import UsageError
    from taskvec_formats.system.parallel import LEAST_MEMORY

    size = parse_size("--max-memory", text)
    if size < LEAST_MEMORY:
        raise UsageError(f"--max-memory must be at least {LEAST_MEMORY // 10**6}MB, found {text}")
    return size


def _limit(size: int | None) -> int | None:
    if size is not None:
        from taskvec_formats.system.parallel import limit_memory

        limit_memory(size)
    return size


# sets the limit when the command line is parsed
MaxMemory = Annotated[
    int | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        parser=_memory,
        callback=_limit,
        help="Use about this much memory at most, e.g. 4GB. With many cores, more memory is quicker.",
        show_default="1GB",
    ),
]


def check_unfinished(folder: Path, kind: str, *, resume: bool, force: bool) -> None:
    """Check, before any work begins, that a folder of unfinished work may be used.

    A note on standard error says if there is nothing to resume.

    Args:
        folder: The folder in which the command keeps its unfinished work; it need not exist.
        kind: The kind of work, "run" or "merge".
        resume: Whether the command continues unfinished work.
        force: Whether it discards unfinished work.

    Raises:
        ResumeError: If the folder is in use, or contains anything other than work of this kind.
        UsageError: If there is unfinished work and neither `resume` nor `force` is set.
    """
    from taskvec.errors import UsageError
    from taskvec.resume import holds_work

    from . import render

    holds = holds_work(folder, kind)
    if resume and not holds:
        render.say(f"taskvec: note: there is nothing to resume in {folder}: the {kind} starts anew", err=True)
    if holds and not resume and not force:
        raise UsageError(f"{folder} contains an unfinished {kind}: --resume continues it, --force starts over")


def parse_size(option: str, text: str) -> int:
    """Parse a size such as 500MB or 2GB (powers of ten) or 500MiB (powers of two), as transformers does.

    Args:
        option: The option that gives the size, for the error message.
        text: A number with a unit.

    Returns:
        The size in bytes.

    Raises:
        UsageError: If the text is no such size.
    """
    from taskvec.errors import UsageError

    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise UsageError(f"{option} must be a size with a unit, such as 500MB or 2GB, found {text!r:.80}")
    thousand = 1024 if found[3] else 1000
    return int(float(found[1]) * thousand ** (1 + "KMGT".index(found[2].upper())))


def numbers(option: str, text: str) -> list[float]:
    """Parse numbers separated by commas.

    Args:
        option: The option that they are given by, for the error message.
        text: The numbers.

    Raises:
        UsageError: If the text is anything else.
    """
    from taskvec.errors import UsageError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} takes numbers separated by commas, found {text!r:.80}") from None
