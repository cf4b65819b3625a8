"""Examples for encoder-decoders: the prompt is the encoder's input, the completion what the decoder says."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch

from ..errors import DataError
from .examples import Example
from .rows import IGNORED, Row, encode_prompt


def encode_source(example: Example, tokenizer: Any, max_length: int) -> list[int]:
    """Token ids of the prompt, with the special tokens that the tokenizer puts around a text: [length ≤ max_length].

    A prompt that is too long loses its beginning. Raises DataError, naming the line, for plain text, which has none.
    """
    if not example.messages:
        raise DataError(f'{example.where}: an encoder-decoder reads a prompt, which {{"text"}} does not have')
    if tokenizer.chat_template:
        return encode_prompt(example, tokenizer)[-max_length:]
    text = "\n".join(message["content"] for message in example.messages)
    side, tokenizer.truncation_side = tokenizer.truncation_side, "left"
    try:
        ids: list[int] = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
    finally:
        tokenizer.truncation_side = side
    return ids


def encode_target(example: Example, tokenizer: Any) -> list[int]:
    """Token ids of the completion as the tokenizer writes a target, and of the end-of-sequence token."""
    ids: list[int] = tokenizer(text_target=example.completion)["input_ids"]
    end, special = tokenizer.eos_token_id, set(tokenizer.all_special_ids)
    closing = takewhile(special.__contains__, reversed(ids))  # MBART's target ends with that token and a language
    return ids if end is None or end in closing else [*ids, end]


def room(config: Any, max_length: int) -> int:
    """How many tokens a prompt or a completion may have: max_length, or the positions of the model if those are fewer.

    config: of the model. Some have as many positions as they like.
    """
    text = config.get_text_config()
    names = ("max_position_embeddings", "max_encoder_position_embeddings", "max_decoder_position_embeddings")
    return min([max_length, *(value for name in names if isinstance(value := getattr(text, name, None), int))])


def encode_pair(example: Example, tokenizer: Any, max_length: int) -> Row:
    """{"input_ids", "labels"} of an encoder-decoder, the prompt and the completion: each [length ≤ max_length].

    A prompt that is too long loses its beginning, a completion its end. Raises DataError, naming the line.
    """
    source = encode_source(example, tokenizer, max_length)
    if not source:
        raise DataError(f"{example.where}: the prompt has no token, and an encoder-decoder reads one")
    return {"input_ids": source, "labels": encode_target(example, tokenizer)[:max_length]}


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
