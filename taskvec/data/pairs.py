"""Examples for encoder-decoders: the prompt is the encoder's input, the completion what the decoder says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from ..errors import DataError
from ..models.kinds import is_encoder_decoder, is_masked
from .examples import Example
from .rows import (
    IGNORED,
    Row,
    RowCounts,
    accepted_arguments,
    collate,
    counted,
    earlier_turns,
    encode_all,
    encode_prompt,
    plain_text,
)


def encode_source(example: Example, tokenizer: Any, max_length: int | None = None) -> list[int]:
    """Token ids of the prompt, with the special tokens that the tokenizer puts around a text: [length ≤ max_length].

    A prompt that is too long loses its beginning. Raises DataError, naming the row, for plain text, which has none.
    """
    if not example.messages:
        raise DataError(f'{example.where}: an encoder-decoder reads a prompt, which {{"text"}} does not have')
    if tokenizer.chat_template:
        ids = encode_prompt(example, tokenizer)
        return ids if max_length is None else ids[-max_length:]
    text = plain_text(example, tokenizer)
    side, tokenizer.truncation_side = tokenizer.truncation_side, "left"
    try:
        found: list[int] = tokenizer(text, truncation=max_length is not None, max_length=max_length)["input_ids"]
    finally:
        tokenizer.truncation_side = side
    return found


def fit_source(example: Example, tokenizer: Any, max_length: int) -> tuple[list[int], int]:
    """`encode_source`, and how many tokens the prompt had before it was cut."""
    whole = encode_source(example, tokenizer)
    return (whole if len(whole) <= max_length else encode_source(example, tokenizer, max_length)), len(whole)


def encode_target(example: Example, tokenizer: Any) -> list[int]:
    """Token ids of the completion as the tokenizer writes a target, and of the end-of-sequence token.

    Raises DataError, naming the row, for an answer that calls tools or has thoughts.
    """
    if example.answer is not None:
        raise DataError(
            f"{example.where}: an encoder-decoder learns a text, and the last message calls tools or has thoughts"
        )
    ids: list[int] = tokenizer(text_target=example.completion)["input_ids"]
    end, special = tokenizer.eos_token_id, set(tokenizer.all_special_ids)
    closing = takewhile(special.__contains__, reversed(ids))  # MBART's target ends with that token and a language
    return ids if end is None or end in closing else [*ids, end]


def encode_pair(example: Example, tokenizer: Any, max_length: int) -> Row:
    """{"input_ids", "labels"} of an encoder-decoder, the prompt and the completion: each [length ≤ max_length].

    A prompt that is too long loses its beginning, a completion its end. Raises DataError, naming the row.
    """
    return _fitted(example, tokenizer, max_length)[0]


def encode_all_pairs(
    examples: Sequence[Example], tokenizer: Any, limit: int, turns: str = "last"
) -> tuple[list[Row], RowCounts]:
    """The rows of examples, in their order, and what became of them, as `encode_all` of rows.py.

    limit: the most tokens of a prompt, and of a completion. turns: only the last one of the assistant can train.
    Raises DataError, naming the row, where "all" are to train and there are earlier ones.
    """
    for example in examples:
        if turns == "all" and earlier_turns(example):
            raise DataError(
                f"{example.where}: an encoder-decoder learns one turn of a conversation; `turns=last` trains the last"
            )
    fitted = [_fitted(example, tokenizer, limit) for example in examples]
    counts = counted(fitted, limit)
    return [row for row, _ in fitted], replace(counts, tokens=counts.tokens + counts.trained)


def rows_of(
    model: nn.Module, examples: Sequence[Example], tokenizer: Any, limit: int, turns: str
) -> tuple[list[Row], RowCounts]:
    """The rows of examples for a model, and what became of them (`encode_all_pairs`, or `encode_all` of rows.py)."""
    if is_encoder_decoder(model):
        return encode_all_pairs(examples, tokenizer, limit, turns)
    return encode_all(examples, tokenizer, limit, masked=is_masked(model), turns=turns)


def _fitted(example: Example, tokenizer: Any, max_length: int) -> tuple[Row, int]:
    """A row, and how many tokens the longer of prompt and completion had before they were cut."""
    (source, length), target = fit_source(example, tokenizer, max_length), encode_target(example, tokenizer)
    if not source:
        raise DataError(f"{example.where}: the prompt has no token, and an encoder-decoder reads one")
    return {"input_ids": source, "labels": target[:max_length]}, max(length, len(target))


def collator_of(model: nn.Module, padding: int) -> Callable[[Sequence[Row]], dict[str, Any]]:
    """What makes a batch of rows for a model. padding: the token id to fill up with."""
    if is_encoder_decoder(model):
        return partial(collate_pairs, padding=padding)
    return partial(collate, padding=padding, accepts=accepted_arguments(model))


def collate_pairs(batch: Sequence[Row], padding: int) -> dict[str, Any]:
    """Pad a batch on the right: positions of an encoder count from the first column, whatever the attention mask says.

    padding: the token id to fill up with. Returns input_ids and attention_mask, int64 [batch, length], and labels,
    int64 [batch, length of the longest completion], IGNORED where padded; the model makes the decoder's input of them.
    """
    width = max(len(row["input_ids"]) for row in batch)
    longest = max(len(row["labels"]) for row in batch)
    ids = torch.full((len(batch), width), padding)
    mask = torch.zeros((len(batch), width), dtype=torch.long)
    labels = torch.full((len(batch), longest), IGNORED)
    for i, row in enumerate(batch):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[i, : len(row["input_ids"])] = 1
        labels[i, : len(row["labels"])] = torch.tensor(row["labels"])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
