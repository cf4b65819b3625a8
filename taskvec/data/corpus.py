"""Training and evaluation examples of a run: its own data, data mixed in, and examples held out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..arguments import real
from ..errors import UsageError
from .examples import Example, example_of
from .sources import read_tables


@dataclass(frozen=True)
class Corpus:
    """Examples of a run.

    Attributes:
        train: Examples to train on.
        held_out: Examples to evaluate on.
        files: Records of the files: name, SHA-256, number of examples taken from the file, use ("data", "eval_data" or
            "mix"), and for "mix" the index of the mix. For Hub data: id, configuration, split, revision, and the
            SHA-256 of the rows.
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
    """Read the examples of a run.

    Args:
        data: A file, a folder of files or a Hub id (`sources.read_tables`).
        mix: (data, share): this share of the training examples is drawn from it without replacement, as in the paper's
            baseline that mixes in data of an earlier task.
        eval_data: Data to evaluate on.
        eval_split: Share of `data` that is held out for evaluation if there is no `eval_data`.
        seed: Seed of the draws.

    Raises:
        DataError: A row cannot be understood.
        UsageError: A file is missing or has too few examples, or the shares are not valid.
    """
    rng = random.Random(seed)
    read = _Source(data)
    train, held_out, files = read.examples, [], read.records("data")
    if eval_data is not None:
        read = _Source(eval_data)
        held_out = read.examples
        files += read.records("eval_data")
    elif eval_split:
        count = max(1, round(eval_split * len(train)))
        if count >= len(train):
            raise UsageError(
                f"{data}: `eval_split={eval_split}` would hold out {count:,} of {len(train):,} examples, and none is "
                "left to train on"
            )
        out = set(rng.sample(range(len(train)), count))
        held_out = [example for number, example in enumerate(train) if number in out]
        train = [example for number, example in enumerate(train) if number not in out]
    shares = [real("a share of `mix`", share) for _, share in mix]
    if not all(0 < share < 1 for share in shares) or sum(shares) >= 1:
        raise UsageError(f"the shares of `mix` must be between 0 and 1 and add up to less than 1, found {shares}")
    total = len(train) / (1 - sum(shares))
    for number, (path, share) in enumerate(mix):
        read, wanted = _Source(path), round(share * total)
        if wanted > len(read.examples):
            raise UsageError(
                f"{path}: a share of {share} takes {wanted:,} examples, the file has {len(read.examples):,}"
            )
        drawn = rng.sample(range(len(read.examples)), wanted)
        train += [read.examples[place] for place in drawn]
        files += read.records("mix", drawn, number=number)
    return Corpus(train, held_out, files)


class _Source:
    """Examples of a path in their order, and the records of the files that they come from."""

    def __init__(self, path: Path) -> None:
        self._tables = read_tables(path)
        self.examples = [example_of(row, where) for table in self._tables for where, row in table.rows]

    def records(self, use: str, drawn: Sequence[int] | None = None, **more: object) -> list[dict[str, object]]:
        """Return one record per file, with its number of examples.

        Args:
            use: "data", "eval_data" or "mix".
            drawn: Indices of the examples that are used; None uses all.
            **more: Further fields of each record.
        """
        records, start = [], 0
        for table in self._tables:
            stop = start + len(table.rows)
            count = len(table.rows) if drawn is None else sum(start <= place < stop for place in drawn)
            records.append({**table.record, "examples": count, "use": use, **more})
            start = stop
        return records
