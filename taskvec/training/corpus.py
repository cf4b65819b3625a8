"""What a run learns from: its own examples, others mixed in, and those held out."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError, UsageError
from ..lineage import shortened
from .examples import Example, read_examples


@dataclass(frozen=True)
class Corpus:
    """train, held_out: examples. files: name, SHA-256 and number of examples taken of each file, for the record."""

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

    mix: (file, share): that share of the examples to train on is drawn from it, without repetition, as in the paper's
        baseline that mixes data of an earlier task in.
    eval_data: examples to evaluate on; or eval_split: the share of `data` that is held out for it. Drawn by `seed`.
    Raises DataError for bad lines and where a file has too few examples, UsageError for a missing file and for shares
    that cannot be.
    """
    dice = random.Random(seed)
    train, held_out = read_examples(data), []
    files = [_file(data, len(train))]
    if eval_data is not None:
        held_out = read_examples(eval_data)
        files.append(_file(eval_data, len(held_out)))
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
    for path, share in mix:
        others, wanted = read_examples(path), round(share * total)
        if wanted > len(others):
            raise DataError(f"{path}: a share of {share} takes {wanted} examples, the file has {len(others)}")
        train += dice.sample(others, wanted)
        files.append(_file(path, wanted))
    return Corpus(train, held_out, files)


def _file(path: Path, examples: int) -> dict[str, object]:
    return {"name": shortened(path.name), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "examples": examples}
