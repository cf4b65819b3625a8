"""An example as a model is going to see it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import AutoModelForMaskedLM

from ..data.examples import Example, read_examples
from ..data.pairs import encode_pair
from ..data.rows import IGNORED, encode, length_limit
from ..models.kinds import loader_of
from ..models.loading import load_tokenizer
from .options import TrainingOptions


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
        parts.append((_text(tokenizer, ids), trains))
    return Preview(example.where, parts, len(pairs), sum(label != IGNORED for _, label in pairs))


def preview_pair(example: Example, tokenizer: Any, limit: int) -> Preview:
    """The same for an encoder-decoder: what the encoder reads, and what the decoder learns to say."""
    row = encode_pair(example, tokenizer, limit)
    source, target = row["input_ids"], row["labels"]
    parts = [(_text(tokenizer, source), False), (_text(tokenizer, target), True)]
    return Preview(example.where, parts, len(source) + len(target), len(target))


def _text(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text


def preview_first(folder: Path, data: Path, options: TrainingOptions) -> Preview:
    """The first example of `data` as the model of a folder would train on it; the model itself is not loaded.

    Raises the errors of `read_examples`, `load_tokenizer` and `preview`.
    """
    example = read_examples(data)[0]
    config, tokenizer = load_tokenizer(folder, trust_remote_code=options.trust_remote_code)
    limit = length_limit(config, options.max_length)
    if getattr(config, "is_encoder_decoder", False):
        return preview_pair(example, tokenizer, limit)
    loader = loader_of(config, folder, trust_remote_code=options.trust_remote_code)
    return preview(example, tokenizer, limit, masked=loader is AutoModelForMaskedLM, turns=options.turns)
