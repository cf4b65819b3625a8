"""Progress bars of commands, on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taskvec.reporting.progress import Progress


@contextmanager
def progress_bars(*, shown: bool = True) -> Iterator[Progress]:
    """Show progress while the block runs.

    This is `taskvec.reporting.bars.progress_bars`, imported on use, so that `--help` does not load the library.

    Args:
        shown: Whether this process shows progress. Of several, one does.

    Yields:
        The progress callback.
    """
    if not shown:
        from taskvec.reporting.progress import silent

        yield silent
        return
    from taskvec.reporting import bars

    with bars.progress_bars() as progress:
        yield progress
