"""How long work reports where it is: a callback, so that the library neither prints nor depends on a terminal."""

from collections.abc import Callable

# (what is being done, steps done, steps in all, a short note such as the loss)
Progress = Callable[[str, int, int, str], None]


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """The Progress that shows nothing."""
