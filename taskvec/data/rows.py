"""Encoding of examples as token ids and labels, with the loss on the assistant's turns only, and batches of them."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..arguments import said
from ..errors import DataError
from .conversations import THOUGHTS, TURNS, Message
from .examples import Example

Row = dict[str, list[int]]
IGNORED = -100  # the label that the losses of transformers skip
_KEPT = {"system", "developer", "user"}  # roles whose messages a chat template must write unchanged
_JOIN = "\n"  # between messages if there is no chat template
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks the assistant's turns in a chat template


@dataclass(frozen=True)
class RowCounts:
    """Counts of the rows that examples were encoded as.

    Attributes:
        rows: Number of rows.
        truncated: Number of rows that lost tokens to `limit`.
        limit: Maximum number of tokens of a row.
        tokens: Tokens in all rows, after truncation.
        trained: Tokens that the loss is computed on.
        longest: Tokens of the longest row before truncation.
        packed: Number of rows after packing; None without packing.
    """

    rows: int
    truncated: int
    limit: int
    tokens: int
    trained: int
    longest: int
    packed: int | None = None


def length_limit(config: Any, max_length: int, first: int = 0) -> int:
    """Maximum number of tokens of a row: max_length, or the number of the model's positions if that is less.

    For an encoder-decoder, it applies to the prompt and the completion separately. Models without a table of positions,
    such as those with ALiBi, use max_length.

    Args:
        config: The config of the model.
        max_length: Maximum number of tokens that the options allow.
        first: Position of the first token.
    """
    text = config.get_text_config()
    if getattr(text, "alibi", False):
        return max_length
    names = ("max_position_embeddings", "max_encoder_position_embeddings", "max_decoder_position_embeddings")
    found = [value for name in names if isinstance(value := getattr(text, name, None), int) and value > 0]
    return min([max_length, *(value - first for value in found)])


def encode_prompt(example: Example, tokenizer: Any) -> list[int]:
    """Encode everything before the completion, through the chat template if the tokenizer has one.

    Args:
        example: The example.
        tokenizer: The tokenizer.

    Returns:
        Token ids.

    Raises:
        DataError: The chat template refuses or omits a message, or does not support tools. The message names the row.
    """
    if not example.messages and not example.tools:  # plain text: only the tokens that the tokenizer puts before a text
        return _opened(tokenizer, "")
    if not tokenizer.chat_template:
        return _opened(tokenizer, plain_text(example, tokenizer))
    _check_template(example, tokenizer)
    text = _rendered(example, tokenizer)
    for number, message in enumerate(example.messages, 1):
        # a template may drop the reasoning of earlier assistant turns, and the content of turns with tool calls
        if message["role"] in _KEPT and message["content"].strip() not in text:
            raise DataError(f"{example.where}: the chat template leaves out message {number}, by {message['role']!r}")
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _opened(tokenizer: Any, text: str) -> list[int]:
    """Encode a text that continues, without the closing tokens that encoder-style tokenizers append."""
    ids: list[int] = tokenizer(text)["input_ids"]
    while ids and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        ids.pop()
    return ids


def encode_completion(example: Example, tokenizer: Any) -> list[int]:
    """Encode the completion and the end-of-sequence token, which the model must learn to generate.

    For an answer with tool calls or reasoning, the text is what the chat template adds to the prompt.

    Args:
        example: The example.
        tokenizer: The tokenizer.

    Returns:
        Token ids.
    """
    text = example.completion if example.answer is None else _templated_answer(example, tokenizer)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def encode(example: Example, tokenizer: Any, max_length: int, *, masked: bool = False, turns: str = TURNS[0]) -> Row:
    """Encode an example as one row.

    A prompt that is too long loses its beginning. A completion longer than max_length loses its end.

    Args:
        example: The example.
        tokenizer: The tokenizer.
        max_length: Maximum number of tokens.
        masked: Whether the model is an encoder, which receives the mask token in place of each token that trains.
        turns: "all" trains all turns of the assistant; "last" only the completion.

    Returns:
        {"input_ids", "labels"}, each [length ≤ max_length]. Labels are IGNORED at tokens that do not train.

    Raises:
        DataError: No token is left to learn, there is no mask token, or the tokens of earlier turns cannot be
            identified. The message names the row.
    """
    return _fitted(example, tokenizer, max_length, masked=masked, turns=turns)[0]


def encode_all(
    examples: Sequence[Example], tokenizer: Any, limit: int, *, masked: bool = False, turns: str = TURNS[0]
) -> tuple[list[Row], RowCounts]:
    """Encode examples as rows.

    Args:
        examples: The examples.
        tokenizer: The tokenizer.
        limit: Maximum number of tokens of a row.
        masked: As in `encode`.
        turns: As in `encode`.

    Returns:
        The rows in the order of the examples, and their counts.

    Raises:
        DataError: As in `encode`.
    """
    fitted = [_fitted(example, tokenizer, limit, masked=masked, turns=turns) for example in examples]
    return [row for row, _ in fitted], counted(fitted, limit)


def counted(fitted: Sequence[tuple[Row, int]], limit: int) -> RowCounts:
    """Count rows and tokens.

    Args:
        fitted: Each row, and its number of tokens before truncation.
        limit: Maximum number of tokens of a row.
    """
    lengths = [length for _, length in fitted]
    return RowCounts(
        rows=len(fitted),
        truncated=sum(length > limit for length in lengths),
        limit=limit,
        tokens=sum(len(row["input_ids"]) for row, _ in fitted),
        trained=sum(label != IGNORED for row, _ in fitted for label in row["labels"]),
        longest=max(lengths, default=0),
    )


def _fitted(example: Example, tokenizer: Any, max_length: int, *, masked: bool, turns: str) -> tuple[Row, int]:
    """Encode an example, and return it with its number of tokens before truncation."""
    completion = encode_completion(example, tokenizer)
    prompt = encode_prompt(example, tokenizer)
    labels = [IGNORED] * len(prompt)
    if turns == "all" and (earlier := earlier_turns(example)):
        labels = _labelled(example, tokenizer, prompt, earlier)
    length = len(prompt) + len(completion)
    completion = completion[:max_length]
    cut = max(0, len(prompt) + len(completion) - max_length)
    ids, labels = prompt[cut:] + completion, labels[cut:] + completion
    if masked:
        if tokenizer.mask_token_id is None:
            raise DataError(f"{example.where}: a masked language model is trained but its tokenizer has no mask token")
        ids = [token if label == IGNORED else tokenizer.mask_token_id for token, label in zip(ids, labels, strict=True)]
        return {"input_ids": ids, "labels": labels}, length
    # nothing precedes the first token, and in a padded batch it must not be predicted from padding
    labels[:1] = [IGNORED]
    if all(label == IGNORED for label in labels):
        raise DataError(f"{example.where}: no token of the completion is left to train on within {max_length} tokens")
    return {"input_ids": ids, "labels": labels}, length


def earlier_turns(example: Example) -> list[int]:
    """Indices of the assistant's messages that train in addition to the completion.

    Args:
        example: The example.
    """
    return [
        i
        for i in range(example.context, len(example.messages))
        if example.messages[i]["role"] == "assistant" and i not in example.skipped
    ]


def _labelled(example: Example, tokenizer: Any, ids: list[int], turns: list[int]) -> list[int]:
    """Labels of a prompt, [len(ids)]: the token ids of these turns, IGNORED elsewhere."""
    if not tokenizer.chat_template:
        spans = _plain_spans(example, turns)
    elif _GENERATION.search(_template(example, tokenizer)):
        spans = _marked_spans(example, tokenizer, turns)
    else:
        spans = _added_spans(example, tokenizer, turns)
    trains = _overlapping(example, tokenizer, ids, spans)
    return [token if train else IGNORED for token, train in zip(ids, trains, strict=True)]


def _plain_spans(example: Example, turns: list[int]) -> list[tuple[int, int]]:
    """Character ranges of these turns in the text of a prompt without a chat template."""
    lengths = [len(message["content"]) for message in example.messages]
    starts = [0, *itertools.accumulate(length + len(_JOIN) for length in lengths)]
    return [(starts[i], starts[i] + lengths[i]) for i in turns]


def _marked_spans(example: Example, tokenizer: Any, turns: list[int]) -> list[tuple[int, int]]:
    """Character ranges of these turns, for a chat template that marks what the assistant says."""
    # the token mask of apply_chat_template extends to the end if a marked text ends in white space without a token
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        conversations=[_formatted(example.messages, example, tokenizer)],
        tools=list(example.tools) or None,
        chat_template=_template(example, tokenizer),
        return_assistant_tokens_mask=True,
        add_generation_prompt=True,
        **tokenizer.special_tokens_map,
    )
    (text,), (spans,) = rendered
    by_assistant = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
    if text != _rendered(example, tokenizer) or len(spans) != len(by_assistant):
        raise DataError(
            f"{example.where}: the chat template marks {len(spans)} texts as the assistant's, which has "
            f"{len(by_assistant)} turns in the prompt; `turns=last` trains the last turn only"
        )
    return [(start, stop) for i, (start, stop) in zip(by_assistant, spans, strict=True) if i in turns]


def _added_spans(example: Example, tokenizer: Any, turns: list[int]) -> list[tuple[int, int]]:
    """Character ranges of these turns, for other chat templates: what each turn adds to the text of the messages before
    it.
    """
    messages, spans = list(example.messages), []
    text = _rendered(example, tokenizer)
    for i in turns:
        if i == 0:
            raise DataError(f"{example.where}: the assistant speaks first; `turns=last` trains the last turn only")
        before = _rendered(example, tokenizer, messages[:i])
        after = _rendered(example, tokenizer, messages[: i + 1], asks=False)
        if not (after.startswith(before) and text.startswith(after)):
            raise DataError(
                f"{example.where}: the chat template writes message {i + 1} differently once others follow, so its "
                "tokens cannot be identified; `turns=last` trains the last turn only"
            )
        spans.append((len(before), len(after)))
    return spans


def _overlapping(example: Example, tokenizer: Any, ids: list[int], spans: list[tuple[int, int]]) -> list[bool]:
    """For each token, whether it shares a character with one of the spans."""
    if not tokenizer.is_fast:
        raise DataError(
            f"{example.where}: the tokenizer does not give the offsets of its tokens, so the tokens of earlier turns "
            "cannot be identified; `turns=last` trains the last turn only"
        )
    text = _rendered(example, tokenizer) if tokenizer.chat_template else plain_text(example, tokenizer)
    special = not tokenizer.chat_template
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"][: len(ids)]
    return [start < end and any(start < last and end > first for first, last in spans) for start, end in offsets]


def plain_text(example: Example, tokenizer: Any) -> str:
    """Text of a prompt without a chat template: the contents of its messages, joined by newlines.

    Args:
        example: The example.
        tokenizer: The tokenizer.

    Raises:
        DataError: The example has tools or reasoning, which need a chat template.
    """
    more = {"tool_calls", *THOUGHTS}
    if example.tools or example.answer is not None or any(more & message.keys() for message in example.messages):
        raise DataError(f"{example.where}: tools and thoughts need a chat template, and the tokenizer has none")
    return _JOIN.join(message["content"] for message in example.messages)


def _template(example: Example, tokenizer: Any) -> str:
    """Text of the chat template for an example; empty if there is none."""
    if not tokenizer.chat_template:
        return ""
    template: str = tokenizer.get_chat_template(None, list(example.tools) or None)
    return template


def _check_template(example: Example, tokenizer: Any) -> None:
    """Raise DataError for tools, tool calls and reasoning that the chat template would silently omit."""
    messages = [*example.messages, *([] if example.answer is None else [example.answer])]
    wanted = ["tools"] * bool(example.tools)
    wanted += [name for name in ("tool_calls", *THOUGHTS) if any(name in message for message in messages)]
    for name in wanted:
        if name not in _template(example, tokenizer):
            raise DataError(f'{example.where}: the chat template has no place for "{name}"')


def _formatted(messages: Sequence[Message], example: Example, tokenizer: Any) -> list[Message]:
    """Messages with contents in the form that the chat template expects: texts, or lists of parts."""
    if not _takes_parts(tokenizer, _template(example, tokenizer)):
        return list(messages)
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


@lru_cache(maxsize=8)
def _takes_parts(tokenizer: Any, template: str) -> bool:
    """Whether a chat template omits plain texts and writes text parts, like those of vision models."""
    text = "a text of the user"
    for content in (text, [{"type": "text", "text": text}]):
        # templates are programs by the model's author and may raise any exception
        with suppress(Exception):
            rendered = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], chat_template=template, tokenize=False
            )
            if text in rendered:
                return content != text
    return False


def _applied(example: Example, tokenizer: Any, messages: list[Message], **settings: Any) -> Any:
    if example.tools:
        settings["tools"] = list(example.tools)
    try:
        return tokenizer.apply_chat_template(_formatted(messages, example, tokenizer), **settings)
    except Exception as error:  # templates are programs by the model's author and may raise any exception
        raise DataError(
            f"{example.where}: the chat template refuses these messages ({said(str(error), 200)[1:-1]})"
        ) from None


def _rendered(example: Example, tokenizer: Any, messages: list[Message] | None = None, *, asks: bool = True) -> str:
    """Messages (default: the prompt's) as the chat template writes them; asks: with the beginning of an answer."""
    chosen = list(example.messages) if messages is None else messages
    text: str = _applied(example, tokenizer, chosen, tokenize=False, add_generation_prompt=asks)
    return text


def _templated_answer(example: Example, tokenizer: Any) -> str:
    """Text that the chat template adds to the prompt for the answer, without the end-of-sequence token."""
    assert example.answer is not None
    if not tokenizer.chat_template:
        return plain_text(example, tokenizer)
    _check_template(example, tokenizer)
    before = _rendered(example, tokenizer) if example.messages else ""
    after = _rendered(example, tokenizer, [*example.messages, example.answer], asks=False)
    if not after.startswith(before):
        raise DataError(f"{example.where}: the chat template does not append the answer to the prompt")
    return after[len(before) :].rstrip().removesuffix(tokenizer.eos_token or "").rstrip()


def pad_id(tokenizer: Any) -> int:
    """Token id of padding. Its value does not matter, because attention and loss ignore it.

    Args:
        tokenizer: The tokenizer.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def collate(batch: Sequence[Row], padding: int, accepts: frozenset[str]) -> dict[str, Any]:
    """Pad a batch on the left to one length L.

    Completions then end in the same column, so a model that supports `logits_to_keep` computes logits for the last
    columns only, and the labels are cut to match. Packed rows (packing.py) get no attention_mask: transformers then
    infers from position_ids, which start again at 0, that no token attends to another example. A token of padding is an
    example of its own.

    Args:
        batch: The rows.
        padding: Token id of padding.
        accepts: Names of the arguments of the model's forward.

    Returns:
        input_ids, attention_mask and position_ids, int64 [batch, L], and labels, int64 [batch, L or fewer columns];
        position_ids and logits_to_keep only if the model accepts them.
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
    if "position_ids" in batch[0]:
        del inputs["attention_mask"]
        inputs["position_ids"] = torch.zeros_like(ids)
        for i, row in enumerate(batch):
            inputs["position_ids"][i, length - len(row["position_ids"]) :] = torch.tensor(row["position_ids"])
        if "use_cache" in accepts:
            inputs["use_cache"] = False  # with a cache, positions are ignored
    elif "position_ids" in accepts:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if "logits_to_keep" in accepts:
        # the first label of the window is predicted from the column before it
        first = int((labels != IGNORED).any(0).nonzero()[0])
        keep = min(length, length - first + 1)
        inputs["logits_to_keep"] = keep
        labels = labels[:, -keep:].contiguous()  # some models flatten them with view()
    inputs["labels"] = labels
    return inputs


def accepted_arguments(model: nn.Module) -> frozenset[str]:
    """Names of the arguments of a model's forward; for an adapted model (peft), those of the model inside.

    position_ids is left out if the model numbers its tokens itself.

    Args:
        model: The model.
    """
    inner: Any = model.get_base_model if hasattr(model, "get_base_model") else None  # a model of peft
    inner = model if inner is None else inner()
    names = frozenset(inspect.signature(inner.forward).parameters)
    return names - {"position_ids"} if first_position(inner) else names


def first_position(model: nn.Module) -> int:
    """Position of the first token. Models such as RoBERTa number tokens from the position after that of padding.

    Args:
        model: The model.

    Returns:
        That position, or 0 for models that use the given positions.
    """
    tables = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None
    ]
    return max(tables, default=0)
