"""Rows and batches for encoder-decoders: the encoder reads the prompt, the decoder learns the completion."""

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
    """Encode the prompt, with the special tokens that the tokenizer adds to a text.

    A prompt that is too long loses its beginning.

    Args:
        example: The example.
        tokenizer: The tokenizer.
        max_length: Maximum number of tokens; None keeps all.

    Returns:
        Token ids, [length ≤ max_length].

    Raises:
        DataError: The example is plain text, which has no prompt. The message names the row.
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
    """Encode the prompt as `encode_source` does, and return it with its number of tokens before it was cut."""
    whole = encode_source(example, tokenizer)
    return (whole if len(whole) <= max_length else encode_source(example, tokenizer, max_length)), len(whole)


def encode_target(example: Example, tokenizer: Any) -> list[int]:
    """Encode the completion as the tokenizer encodes targets, with the end-of-sequence token.

    Args:
        example: The example.
        tokenizer: The tokenizer.

    Returns:
        Token ids.

    Raises:
        DataError: The answer has tool calls or reasoning. The message names the row.
    """
    if example.answer is not None:
        raise DataError(
            f"{example.where}: an encoder-decoder is trained on texts, but the last message calls tools or has thoughts"
        )
    ids: list[int] = tokenizer(text_target=example.completion)["input_ids"]
    end, special = tokenizer.eos_token_id, set(tokenizer.all_special_ids)
    closing = takewhile(special.__contains__, reversed(ids))  # MBART's targets end with this token and a language
    return ids if end is None or end in closing else [*ids, end]


def encode_pair(example: Example, tokenizer: Any, max_length: int) -> Row:
    """Encode an example for an encoder-decoder.

    A prompt that is too long loses its beginning, a completion its end.

    Args:
        example: The example.
        tokenizer: The tokenizer.
        max_length: Maximum number of tokens of the prompt, and of the completion.

    Returns:
        {"input_ids", "labels"}, the prompt and the completion, each [length ≤ max_length].

    Raises:
        DataError: The example cannot be encoded. The message names the row.
    """
    return _fitted(example, tokenizer, max_length)[0]


def encode_all_pairs(
    examples: Sequence[Example], tokenizer: Any, limit: int, turns: str = "last"
) -> tuple[list[Row], RowCounts]:
    """Encode examples for an encoder-decoder, as `rows.encode_all` does for other models.

    Args:
        examples: The examples.
        tokenizer: The tokenizer.
        limit: Maximum number of tokens of a prompt, and of a completion.
        turns: "all" or "last". Only the last turn of the assistant can train.

    Returns:
        The rows in the order of the examples, and their counts.

    Raises:
        DataError: `turns` is "all" and an example has earlier turns that would train, or an example cannot be encoded.
            The message names the row.
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
    """Encode examples for a model, with `encode_all_pairs` or `rows.encode_all`.

    Args:
        model: The model.
        examples: The examples.
        tokenizer: Its tokenizer.
        limit: Maximum number of tokens of a row.
        turns: "all" or "last".

    Returns:
        The rows in the order of the examples, and their counts.
    """
    if is_encoder_decoder(model):
        return encode_all_pairs(examples, tokenizer, limit, turns)
    return encode_all(examples, tokenizer, limit, masked=is_masked(model), turns=turns)


def _fitted(example: Example, tokenizer: Any, max_length: int) -> tuple[Row, int]:
    """Encode an example, and return it with the length before cutting of the longer of prompt and completion."""
    (source, length), target = fit_source(example, tokenizer, max_length), encode_target(example, tokenizer)
    if not source:
        raise DataError(f"{example.where}: the prompt has no tokens, and an encoder-decoder needs a prompt")
    return {"input_ids": source, "labels": target[:max_length]}, max(length, len(target))


def collator_of(model: nn.Module, padding: int) -> Callable[[Sequence[Row]], dict[str, Any]]:
    """Return the function that makes a batch of rows for a model.

    Args:
        model: The model.
        padding: Token id of padding.
    """
    if is_encoder_decoder(model):
        return partial(collate_pairs, padding=padding)
    return partial(collate, padding=padding, accepts=accepted_arguments(model))


def collate_pairs(batch: Sequence[Row], padding: int) -> dict[str, Any]:
    """Pad a batch on the right, because encoders count positions from the first column whatever the attention mask is.

    Args:
        batch: Rows of `encode_pair`.
        padding: Token id of padding.

    Returns:
        input_ids and attention_mask, int64 [batch, length], and labels, int64 [batch, length of the longest
        completion], IGNORED where padded. The model derives the decoder's input from the labels.
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
