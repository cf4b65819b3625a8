"""From an exception to one sentence and an exit code."""

from __future__ import annotations

from taskvec.errors import OutputExistsError, TaskvecError, UsageError
from taskvec_formats import FormatError
from taskvec_formats.errors import WorkerError
from taskvec_formats.text import printable

USAGE, FAILURE = 2, 1


def explain(error: Exception) -> tuple[str, int]:
    """What to tell the user, and how to exit. An error of neither package is a bug, and says how to see it whole."""
    if isinstance(error, OutputExistsError):
        return f"{error}; --force replaces it", USAGE
    if isinstance(error, UsageError):
        return str(error), USAGE
    if isinstance(error, (TaskvecError, FormatError, WorkerError)):
        return str(error), FAILURE
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return printable(named), FAILURE
    if isinstance(error, MemoryError):
        return "out of memory", FAILURE
    return printable(f"unexpected {type(error).__name__}: {error} (TASKVEC_DEBUG=1 shows where)"), FAILURE
