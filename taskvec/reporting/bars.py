"""Progress on standard error: bars on a terminal, otherwise occasional lines."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from ..arguments import said
from ..errors import UsageError
from .progress import Progress, silent

FIRST, EVERY = 20.0, 30.0  # seconds until the first line, and from one line to the next
_STAGE = 24  # the largest width of the name of a stage, in characters


@contextmanager
def progress_bars(first: float = FIRST, every: float = EVERY) -> Iterator[Progress]:
    """Show progress on standard error within a `with` block.

    A terminal shows one bar per stage. Otherwise one line is printed after `first` seconds and then every `every`
    seconds, so that quick commands print none.

    Args:
        first: Seconds until the first line.
        every: Seconds between lines.

    Yields:
        The Progress to report to.
    """
    with _bars() if sys.stderr.isatty() else _lines(sys.stderr, first, every) as progress:
        yield progress


@contextmanager
def shown(progress: bool | Progress) -> Iterator[Progress]:
    """Provide the Progress that a caller asked for within a `with` block.

    Args:
        progress: True shows bars on a terminal, or prints occasional lines on standard error otherwise; False shows
            nothing; a Progress is used unchanged.

    Yields:
        The Progress to report to.

    Raises:
        UsageError: `progress` is something else.
    """
    if progress is True:
        with progress_bars() as bars:
            yield bars
    elif progress is False:
        yield silent
    elif callable(progress):
        yield progress
    else:
        raise UsageError(f"progress must be True, False or a callable, found {said(progress)}")


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining
    from rich.table import Column

    from taskvec_formats.text import printable

    from .report import NOTE, memory

    # columns with a ratio share the width that the others leave
    columns = (
        TextColumn(
            "{task.description}", markup=False, table_column=Column(max_width=_STAGE, no_wrap=True, overflow="ellipsis")
        ),
        BarColumn(None, table_column=Column(ratio=1)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        Remaining(table_column=Column(no_wrap=True)),
        TextColumn(
            "{task.fields[note]}",
            style="dim",
            markup=False,
            table_column=Column(ratio=2, no_wrap=True, overflow="ellipsis"),
        ),
    )
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, speed_estimate_period=300, transient=True, expand=True) as bars:
        stages: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int, note: str = "") -> None:
            note = printable(f"{note}, {memory()}" if note and done < total else note, NOTE)
            if stage not in stages:
                stages[stage] = bars.add_task(printable(stage, NOTE), total=total, note=note)
            elif done < bars.tasks[stages[stage]].completed:  # the stage has started again
                bars.reset(stages[stage], total=total, note=note)
            bars.update(stages[stage], completed=done, total=total, note=note)

        yield show


@contextmanager
def _lines(stream: TextIO, first: float, every: float) -> Iterator[Progress]:
    """Print lines from a separate thread, because one step may take minutes.

    The process may fork while the thread runs, so the thread imports nothing: a child could wait for its import lock.
    """
    from .report import Report

    report, finished = Report(), threading.Event()

    def work() -> None:
        wait = first
        while not finished.wait(wait):
            try:
                print(report.line(), file=stream, flush=True)
            except (OSError, ValueError):  # the stream was closed
                return
            wait = every

    thread = threading.Thread(target=work, name="progress", daemon=True)
    thread.start()
    try:
        yield report.show
    finally:
        finished.set()
        thread.join(timeout=1)  # a blocked pipe must not keep the command from ending
