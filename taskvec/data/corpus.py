"""What a run learns from: its own examples, others mixed in, and those held out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError, UsageError
from .examples import Example, example_of
from .sources import read_tables


@dataclass(frozen=True)
class Corpus:
    """train, held_out: examples. files: for the record, of each file its name, SHA-256, the number of examples
    taken of it, its use ("data", "eval_data" or "mix"), and of a mix its number.

    Of a data set of the Hub, `files` has its id, configuration, split and revision, and the SHA-256 of its rows.
    """

    train: list[Example]
    held_out: list[Example]
    files: list[dict[str, object]]


def read_corpus(
    data: Path,
    *,
    mix: Sequence[tuple[Path, float]] = (),
    eval_data: Path | None = None,
    eval_split: float = 0.0,
    seed: int = 0,
) -> Corpus:
    """Read a task's examples.

    data, eval_data: as `sources.read_tables` takes them: files, folders or Hub ids.
    mix: (file, share): that share of the examples to train on is drawn from it, without repetition, as in the paper's
        baseline that mixes data of an earlier task in.
    eval_data: examples to evaluate on; or eval_split: the share of `data` that is held out for it. Drawn by `seed`.
    Raises DataError for bad lines and where a file has too few examples, UsageError for a missing file and for shares
    that cannot be.
    """
    dice = random.Random(seed)
    read = _Source(data)
    train, held_out, files = read.examples, [], read.records("data")
    if eval_data is not None:
        read = _Source(eval_data)
        held_out = read.examples
        files += read.records("eval_data")
    elif eval_split:
        count = max(1, round(eval_split * len(train)))
        if count >= len(train):
            raise DataError(f"{data}: of {len(train)} examples {count} would be held out, which leaves none to learn")
        out = set(dice.sample(range(len(train)), count))
        held_out = [example for number, example in enumerate(train) if number in out]
        train = [example for number, example in enumerate(train) if number not in out]
    shares = [share for _, share in mix]
    if not all(0 < share < 1 for share in shares) or sum(shares) >= 1:
        raise UsageError(f"the shares to mix in lie between 0 and 1 and add up to less than 1, found {shares}")
    total = len(train) / (1 - sum(shares))
    for number, (path, share) in enumerate(mix):
        read, wanted = _Source(path), round(share * total)
        if wanted > len(read.examples):
            raise DataError(f"{path}: a share of {share} takes {wanted} examples, the file has {len(read.examples)}")
        drawn = dice.sample(range(len(read.examples)), wanted)
        train += [read.examples[place] for place in drawn]
        files += read.records("mix", drawn, number=number)
    return Corpus(train, held_out, files)


class _Source:
    """The examples of a path in their order, and what a run records of the files that they come from."""

    def __init__(self, path: Path) -> None:
        self._tables = read_tables(path)
        self.examples = [example_of(row, where) for table in self._tables for where, row in table.rows]

    def records(self, use: str, drawn: Sequence[int] | None = None, **more: object) -> list[dict[str, object]]:
        """One a file, with the number of its examples, or of those among `drawn`, the numbers of examples.

        use: "data", "eval_data" or "mix". more: what else is recorded of each.
        """
        records, start = [], 0
        for table in self._tables:
            stop = start + len(table.rows)
            count = len(table.rows) if drawn is None else sum(start <= place < stop for place in drawn)
            records.append({**table.record, "examples": count, "use": use, **more})
            start = stop
        return records
