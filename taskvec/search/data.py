"""Held-out data of a search: one part to choose a merge on, and one to report it on."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..arguments import real
from ..data.examples import Example, read_examples
from ..data.sources import read_tables
from ..errors import UsageError

LEAST = 2  # different examples in each part: a standard error needs two


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

    Equal examples are in the same part, also if they are of different tasks: what is reported on was not searched on.

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
    found = {name: read_examples(path)[:limit] for name, path in data.items()}
    held_out: set[bytes] = set()
    for examples in found.values():
        keys = Counter(sorted(_key(example, seed) for example in examples))
        wanted, count = round(share * len(examples)), 0
        for different, (key, copies) in enumerate(keys.items()):
            if count >= wanted and different >= LEAST:
                break
            held_out.add(key)
            count += copies
    parts = []
    for name, examples in found.items():
        chosen_on = [example for example in examples if _key(example, seed) not in held_out]
        reported_on = [example for example in examples if _key(example, seed) in held_out]
        if len({_key(example, seed) for example in chosen_on}) < LEAST:
            number = "1 example is" if len(examples) == 1 else f"{len(examples)} examples are"
            raise UsageError(
                f"{data[name]}: {number} too few: with `holdout={holdout}`, {len(reported_on)} of them are reported "
                f"on, and at least {LEAST} different ones must be left to choose on"
            )
        files = [table.record for table in read_tables(data[name])]
        parts.append(TaskData(name, chosen_on, reported_on, files))
    return parts


def _key(example: Example, seed: int) -> bytes:
    """Return a hash of the content of an example, whose order is random."""
    content = [example.messages, example.completion, example.context, example.answer, example.tools]
    text = json.dumps([seed, *content], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
