"""From an exception to one sentence and an exit code."""

from __future__ import annotations

import re
from collections.abc import Collection

from taskvec.errors import OutputExistsError, TaskvecError, UsageError
from taskvec_formats import FormatError
from taskvec_formats.errors import WorkerError
from taskvec_formats.text import printable

USAGE, FAILURE = 2, 1
_OPTION = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`")


def with_flags(text: str, names: Collection[str]) -> str:
    """A sentence of the library, in which options stand as `name` or `name=value`, for the command line: --name value.

    Args:
        text: The sentence. Names of other things in backticks stay as they are.
        names: Those of the options, with underscores.
    """

    def flag(found: re.Match[str]) -> str:
        name, value = found.groups()
        if name not in names:
            return found[0]
        words = [f"--{name.replace('_', '-')}", *([] if value in (None, "True") else [value])]
        return " ".join(words)

    return _OPTION.sub(flag, text)


def explain(error: Exception, names: Collection[str]) -> tuple[str, int]:
    """What to tell the user, and how to exit. An error of neither package is a bug, and says how to see it whole."""
    if isinstance(error, OutputExistsError):
        return f"{error}; --force replaces it", USAGE
    if isinstance(error, UsageError):
        return with_flags(str(error), names), USAGE
    if isinstance(error, (TaskvecError, FormatError, WorkerError)):
        return with_flags(str(error), names), FAILURE
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return printable(named), FAILURE
    if isinstance(error, MemoryError):
        return "out of memory", FAILURE
    return printable(f"unexpected {type(error).__name__}: {error} (TASKVEC_DEBUG=1 shows where)"), FAILURE
