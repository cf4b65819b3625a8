"""An example as a model is going to see it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from .examples import Example, read_examples
from .loading import load_tokenizer
from .options import Options
from .rows import IGNORED, encode, length_limit


@dataclass(frozen=True)
class Preview:
    """One example, formatted.

    where: its row of data. parts: (text, whether the loss is on it), in order, with special tokens as text. Of an
    encoder, which sees mask tokens there, it is the text to fill in. tokens, trained: how many in all, and with a loss.
    """

    where: str
    parts: list[tuple[str, bool]]
    tokens: int
    trained: int


def preview(example: Example, tokenizer: Any, limit: int, *, masked: bool = False, turns: str = "all") -> Preview:
    """An example as `encode` in rows.py makes a row of it; limit: the most tokens. Raises DataError as that does."""
    row = encode(example, tokenizer, limit, masked=masked, turns=turns)
    pairs = list(zip(row["input_ids"], row["labels"], strict=True))
    parts = []
    for trains, part in groupby(pairs, lambda pair: pair[1] != IGNORED):
        ids = [label if trains else token for token, label in part]
        parts.append((tokenizer.decode(ids, clean_up_tokenization_spaces=False), trains))
    return Preview(example.where, parts, len(pairs), sum(label != IGNORED for _, label in pairs))


def preview_first(folder: Path, data: Path, options: Options) -> Preview:
    """The first example of `data` as the model of a folder would train on it; the model itself is not loaded.

    Raises the errors of `read_examples`, `load_tokenizer` and `preview`.
    """
    example = read_examples(data)[0]
    config, tokenizer = load_tokenizer(folder, trust_remote_code=options.trust_remote_code)
    masked = any(name.endswith("ForMaskedLM") for name in config.architectures or ())
    limit = length_limit(config, options.max_length)
    return preview(example, tokenizer, limit, masked=masked, turns=options.turns)
