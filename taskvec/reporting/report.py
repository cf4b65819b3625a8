"""The latest progress report as one line of text: stage, steps, note, remaining time, memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from taskvec_formats.text import printable

from .resident import resident

_LINE, NOTE = 200, 80  # the largest numbers of characters


@dataclass
class _Stage:
    """The state of a stage. Times are in seconds.

    Attributes:
        name: The name of the stage.
        began: The time of the first report.
        before: The steps done at the first report.
        at: The time of the latest report.
        done: The steps done at the latest report.
        total: The steps in all.
        note: The latest note.
    """

    name: str
    began: float
    before: int
    at: float
    done: int
    total: int
    note: str

    def left(self, now: float) -> float | None:
        """Return the remaining seconds at the speed so far, or None if unknown."""
        if not self.before < self.done < self.total:
            return None
        each = (self.at - self.began) / (self.done - self.before)
        return max(0.0, each * (self.total - self.done) - (now - self.at))


class Report:
    """Keeps the latest progress report and formats it as one line of text.

    Args:
        clock: Returns the time in seconds, from any origin.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._stages: dict[str, _Stage] = {}
        self._last: _Stage | None = None

    def show(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Record a report. This method is a Progress.

        Args:
            stage: The stage.
            done: The steps done.
            total: The steps in all.
            note: A short note.
        """
        now = self._clock()
        before = self._stages.get(stage)
        if before is None or done < before.done:
            self._stages[stage] = self._last = _Stage(stage, now, done, now, done, total, note)
            return
        # a new object: another thread may be reading the old one
        self._stages[stage] = self._last = _Stage(stage, before.began, before.before, now, done, total, note)

    def line(self) -> str:
        """Return one line: the elapsed time, the stage, its steps, its note, the remaining time and the memory used."""
        now, stage = self._clock(), self._last
        parts = ["working"]
        if stage is not None:
            parts = [f"{printable(stage.name, NOTE)} {stage.done:,}/{stage.total:,}", printable(stage.note, NOTE)]
            if (left := stage.left(now)) is not None:
                parts.append(f"{_clock(left)} left")
        parts.append(memory())
        return printable(f"[{_clock(now - self._began)}] " + ", ".join(part for part in parts if part), _LINE)


def memory() -> str:
    """Return the memory of tensors if a CUDA device is in use, else the process's resident memory; "" if unknown."""
    cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
    initialized = getattr(cuda, "is_initialized", None)
    if initialized is not None and initialized():
        return f"{_size(cuda.memory_allocated())} on the device"
    held = resident()
    return "" if held is None else f"{_size(held)} memory"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _clock(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds: 1:02:03."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
