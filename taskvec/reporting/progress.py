"""The progress callback, through which the library reports progress without printing."""

from collections.abc import Callable

# (stage, steps done, steps in all, a short note such as the loss)
Progress = Callable[[str, int, int, str], None]


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """A Progress that ignores all reports."""
