"""Held-out data of a search: one part to choose a merge on, and one to report it on."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..arguments import real
from ..data.examples import Example, read_examples
from ..data.sources import read_tables
from ..errors import UsageError

LEAST = 2  # examples in each part: a standard error needs two


@dataclass(frozen=True)
class TaskData:
    """The data of one task.

    Attributes:
        name: The name of the task.
        chosen_on: The examples that merges are compared on.
        reported_on: The examples that the best merge is reported on.
        files: Name and SHA-256 of each file.
    """

    name: str
    chosen_on: Sequence[Example]
    reported_on: Sequence[Example]
    files: Sequence[Mapping[str, object]]


def split(data: Mapping[str, Path], holdout: float, *, limit: int | None = None, seed: int = 0) -> list[TaskData]:
    """Read data, and divide each task into two parts at random.

    Args:
        data: Name of a task -> file, folder or Hub id.
        holdout: The share of the examples to report on, in (0, 1).
        limit: The number of examples of each task to use, from the first. None uses all.
        seed: The seed of the division.

    Raises:
        UsageError: A path does not exist, the share is not valid, or a task has too few examples.
        DataError: A row cannot be understood.
    """
    share = real("`holdout`", holdout)
    if not 0 < share < 1:
        raise UsageError(f"`holdout` must be between 0 and 1, both excluded; found {holdout}")
    found = []
    for name, path in data.items():
        examples = read_examples(path)[:limit]
        count = max(LEAST, round(share * len(examples)))
        if len(examples) - count < LEAST:
            raise UsageError(
                f"{path}: {len(examples)} examples are too few: with `holdout={holdout}`, {count} of them are reported "
                f"on, and at least {LEAST} must be left to choose on"
            )
        held_out = set(random.Random(f"{seed} {name}").sample(range(len(examples)), count))
        chosen_on = [example for number, example in enumerate(examples) if number not in held_out]
        reported_on = [example for number, example in enumerate(examples) if number in held_out]
        found.append(TaskData(name, chosen_on, reported_on, [table.record for table in read_tables(path)]))
    return found
