"""Error messages and exit codes for exceptions."""

from __future__ import annotations

import re
from collections.abc import Collection

from taskvec.errors import OutputExistsError, StoppedError, TaskvecError, UsageError
from taskvec_formats import FormatError
from taskvec_formats.errors import WorkerError
from taskvec_formats.text import printable

from .interrupts import Interrupted

USAGE, FAILURE = 2, 1
# options whose names in the library and on the command line differ
_FLAGS = {"lam": "lambda", "max_bytes": "max_size"}
_OPTION = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`")


def with_flags(text: str, names: Collection[str]) -> str:
    """Rewrite the options in a message of the library as flags of the command line.

    Args:
        text: The message. Options are written as `name` or `name=value`, in backticks. Other names in backticks are
            left unchanged.
        names: The names of the options, with underscores.

    Returns:
        The message with --name or --name value in place of each option.
    """

    def flag(found: re.Match[str]) -> str:
        name, value = found.groups()
        name = _FLAGS.get(name, name)
        if name not in names:
            return found[0]
        words = [f"--{name.replace('_', '-')}", *([] if value in (None, "True") else [value])]
        return " ".join(words)

    return _OPTION.sub(flag, text)


def explain(error: Exception | Interrupted, names: Collection[str]) -> tuple[str, int]:
    """Return the message and the exit code for an exception.

    Args:
        error: Any exception. One that neither the packages nor the system raise on purpose is reported as unexpected,
            together with how to see its traceback.
        names: The names of the options, with underscores.

    Returns:
        The message, one sentence, and the exit code: 2 for usage errors, 1 for failures, 130 and 143 for signals.
    """
    if isinstance(error, Interrupted):
        return str(error), error.code
    if isinstance(error, OutputExistsError):
        return f"{error}; --force replaces it", USAGE
    if isinstance(error, (TaskvecError, FormatError, WorkerError)):
        return with_flags(str(error), names), _code(error)
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return printable(named), FAILURE
    if isinstance(error, MemoryError):
        return "out of memory", FAILURE
    return printable(f"unexpected {type(error).__name__}: {error} (set TASKVEC_DEBUG=1 to see the traceback)"), FAILURE


def _code(error: Exception) -> int:
    """Return the exit code for an exception that the packages raise on purpose."""
    if isinstance(error, StoppedError):
        return 128 + error.signal
    return USAGE if isinstance(error, UsageError) else FAILURE
