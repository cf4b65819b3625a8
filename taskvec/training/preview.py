"""Preview of an example as the model receives it."""

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
    """One formatted example.

    Attributes:
        where: The row of data it comes from.
        parts: (text, whether the loss is computed on it), in order, with special tokens as text. For an encoder, which
            receives mask tokens there, the text that it fills in.
        tokens: Number of tokens.
        trained: Number of tokens with a loss.
    """

    where: str
    parts: list[tuple[str, bool]]
    tokens: int
    trained: int


def preview(example: Example, tokenizer: Any, limit: int, *, masked: bool = False, turns: str = "all") -> Preview:
    """Format an example in the way that `data.rows.encode` encodes it.

    Args:
        example: The example.
        tokenizer: The tokenizer.
        limit: Maximum number of tokens.
        masked: As in `encode`.
        turns: As in `encode`.

    Raises:
        DataError: As in `encode`.
    """
    row = encode(example, tokenizer, limit, masked=masked, turns=turns)
    pairs = list(zip(row["input_ids"], row["labels"], strict=True))
    parts = []
    for trains, part in groupby(pairs, lambda pair: pair[1] != IGNORED):
        ids = [label if trains else token for token, label in part]
        parts.append((_text(tokenizer, ids), trains))
    return Preview(example.where, parts, len(pairs), sum(label != IGNORED for _, label in pairs))


def preview_pair(example: Example, tokenizer: Any, limit: int) -> Preview:
    """Format an example for an encoder-decoder: the input of the encoder, and the text that the decoder learns.

    Args:
        example: The example.
        tokenizer: The tokenizer.
        limit: Maximum number of tokens of each part.

    Raises:
        DataError: The example cannot be encoded for an encoder-decoder.
    """
    row = encode_pair(example, tokenizer, limit)
    source, target = row["input_ids"], row["labels"]
    parts = [(_text(tokenizer, source), False), (_text(tokenizer, target), True)]
    return Preview(example.where, parts, len(source) + len(target), len(target))


def _text(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text


def preview_first(folder: Path, data: Path, options: TrainingOptions) -> Preview:
    """Format the first example of `data` for the model of a folder, without loading the model.

    Args:
        folder: The model folder.
        data: A file, a folder of files or a Hub id.
        options: The options of the run.

    Raises:
        TaskvecError: The errors of `read_examples`, `load_tokenizer` and `preview`.
    """
    example = read_examples(data)[0]
    config, tokenizer = load_tokenizer(folder, trust_remote_code=options.trust_remote_code)
    limit = length_limit(config, options.max_length)
    if getattr(config, "is_encoder_decoder", False):
        return preview_pair(example, tokenizer, limit)
    loader = loader_of(config, folder, trust_remote_code=options.trust_remote_code)
    return preview(example, tokenizer, limit, masked=loader is AutoModelForMaskedLM, turns=options.turns)
