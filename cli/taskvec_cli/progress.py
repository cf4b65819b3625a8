"""Progress of a command on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taskvec.reporting.progress import Progress


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """`taskvec.reporting.bars.progress_bars`, imported when it is needed: `--help` does without the library."""
    from taskvec.reporting import bars

    with bars.progress_bars() as progress:
        yield progress
