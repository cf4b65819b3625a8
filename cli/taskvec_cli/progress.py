"""Progress bars on a terminal, nothing in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taskvec.progress import Progress


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Yield a Progress that draws one bar a stage on standard error where that is a terminal."""
    if not sys.stderr.isatty():
        from taskvec.progress import silent

        yield silent
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    from taskvec_formats.text import printable

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
    )
    with Progress(*columns, console=Console(file=sys.stderr)) as bars:
        stages: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int, note: str = "") -> None:
            note = printable(note, 80)
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total, note=note)
            bars.update(stages[stage], completed=done, total=total, note=note)

        yield show
