"""Examples as token ids and labels, the loss on the completion only, and batches of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..arguments import said
from ..errors import DataError
from .examples import Example

Row = dict[str, list[int]]
IGNORED = -100  # the label that transformers' losses skip


def encode_prompt(example: Example, tokenizer: Any) -> list[int]:
    """Token ids of everything before the completion, through the chat template where the tokenizer has one."""
    if not example.messages:
        return []
    if not tokenizer.chat_template:
        text = "\n".join(message["content"] for message in example.messages)
        ids: list[int] = tokenizer(text)["input_ids"]
        # encoder-style tokenizers close every sequence; a prompt goes on
        while ids and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
            ids.pop()
        return ids
    try:
        text = tokenizer.apply_chat_template(list(example.messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs of the model's author and raise what they like
        raise DataError(
            f"{example.where}: the chat template refuses these messages ({said(str(error), 200)[1:-1]})"
        ) from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_completion(example: Example, tokenizer: Any) -> list[int]:
    """Token ids of the completion and of the end-of-sequence token, which the model must learn to say."""
    ids: list[int] = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def encode(example: Example, tokenizer: Any, max_length: int, *, masked: bool = False) -> Row:
    """{"input_ids", "labels"}, each [length ≤ max_length]; labels are IGNORED outside the completion.

    A prompt that is too long loses its beginning, a completion longer than max_length its end.
    masked: for an encoder, which sees the mask token in place of each token of the completion.
    Raises DataError, naming the line, where nothing is left to learn or there is no mask token.
    """
    completion = encode_completion(example, tokenizer)[:max_length]
    prompt = encode_prompt(example, tokenizer)
    prompt = prompt[max(0, len(prompt) + len(completion) - max_length) :]
    labels = [IGNORED] * len(prompt) + completion
    if masked:
        if tokenizer.mask_token_id is None:
            raise DataError(f"{example.where}: a masked language model is trained but its tokenizer has no mask token")
        return {"input_ids": prompt + [tokenizer.mask_token_id] * len(completion), "labels": labels}
    # nothing precedes the first token, and in a padded batch it must not be guessed from padding
    labels[:1] = [IGNORED]
    if all(label == IGNORED for label in labels):
        raise DataError(f"{example.where}: no token of the completion can be learnt within {max_length} tokens")
    return {"input_ids": prompt + completion, "labels": labels}


def pad_id(tokenizer: Any) -> int:
    """The id to pad with: whatever it is, attention and loss leave it out."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def collate(batch: Sequence[Row], padding: int, accepts: frozenset[str]) -> dict[str, Any]:
    """Pad a batch on the left to one length L.

    padding: the token id to fill up with. accepts: names of the arguments that the model's forward takes.
    Returns input_ids, attention_mask and position_ids, int64 [batch, L], and labels. Completions then end in the same
    column, so a model that can (`logits_to_keep`) computes logits for the last columns only; labels are cut to match.
    """
    length = max(len(row["input_ids"]) for row in batch)
    ids = torch.full((len(batch), length), padding)
    labels = torch.full((len(batch), length), IGNORED)
    mask = torch.zeros((len(batch), length), dtype=torch.long)
    for i, row in enumerate(batch):
        start = length - len(row["input_ids"])
        ids[i, start:] = torch.tensor(row["input_ids"])
        labels[i, start:] = torch.tensor(row["labels"])
        mask[i, start:] = 1
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in accepts:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if "logits_to_keep" in accepts:
        # the first label of the window is predicted from the column before it
        first = int((labels != IGNORED).any(0).nonzero()[0])
        keep = min(length, length - first + 1)
        inputs["logits_to_keep"] = keep
        labels = labels[:, -keep:]
    inputs["labels"] = labels
    return inputs


def accepted_arguments(model: nn.Module) -> frozenset[str]:
    """Names of the arguments that the model's forward takes."""
    return frozenset(inspect.signature(model.forward).parameters)
