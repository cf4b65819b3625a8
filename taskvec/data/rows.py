"""Examples as token ids and labels, the loss on what the assistant says only, and batches of them."""

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
IGNORED = -100  # the label that transformers' losses skip
_KEPT = {"system", "developer", "user"}  # whose messages a chat template must write as they are
_JOIN = "\n"  # between messages where there is no chat template
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template with it marks what the assistant says


@dataclass(frozen=True)
class RowCounts:
    """What became of examples as rows of tokens.

    rows: how many. truncated: how many of them lost tokens to `limit`, the most that a row may have. tokens: in all
    rows, after that; trained: how many of these the loss is on. longest: tokens of the longest before it was cut.
    packed: rows after packing, or None.
    """

    rows: int
    truncated: int
    limit: int
    tokens: int
    trained: int
    longest: int
    packed: int | None = None


def length_limit(config: Any, max_length: int, first: int = 0) -> int:
    """The most tokens of a row: max_length, or the positions of a model that has fewer.

    config: transformers'. first: the position of the first token. Of an encoder-decoder a prompt and a completion may
    each have as many. Models without a table of positions, ALiBi among them, keep max_length.
    """
    text = config.get_text_config()
    if getattr(text, "alibi", False):
        return max_length
    names = ("max_position_embeddings", "max_encoder_position_embeddings", "max_decoder_position_embeddings")
    found = [value for name in names if isinstance(value := getattr(text, name, None), int) and value > 0]
    return min([max_length, *(value - first for value in found)])


def encode_prompt(example: Example, tokenizer: Any) -> list[int]:
    """Token ids of everything before the completion, through the chat template where the tokenizer has one.

    Raises DataError, naming the row, where the template refuses the messages or has no place for tools.
    """
    if not example.messages and not example.tools:  # plain text, which begins as the tokenizer has texts begin
        return _opened(tokenizer, "")
    if not tokenizer.chat_template:
        return _opened(tokenizer, plain_text(example, tokenizer))
    _check_template(example, tokenizer)
    text = _rendered(example, tokenizer)
    for number, message in enumerate(example.messages, 1):
        # an assistant's earlier turns may lose their thoughts, and calls stand for their own content
        if message["role"] in _KEPT and message["content"].strip() not in text:
            raise DataError(f"{example.where}: the chat template leaves out message {number}, by {message['role']!r}")
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _opened(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that goes on: encoder-style tokenizers close every sequence, and that is left out."""
    ids: list[int] = tokenizer(text)["input_ids"]
    while ids and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        ids.pop()
    return ids


def encode_completion(example: Example, tokenizer: Any) -> list[int]:
    """Token ids of the completion and of the end-of-sequence token, which the model must learn to say.

    Of an answer that calls tools it is what the chat template adds for it.
    """
    text = example.completion if example.answer is None else _templated_answer(example, tokenizer)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def encode(example: Example, tokenizer: Any, max_length: int, *, masked: bool = False, turns: str = TURNS[0]) -> Row:
    """{"input_ids", "labels"}, each [length ≤ max_length]; labels are IGNORED outside what trains.

    A prompt that is too long loses its beginning, a completion longer than max_length its end.
    masked: for an encoder, which sees the mask token in place of each token that trains.
    turns: "all" turns of the assistant train, or the "last", the completion, alone.
    Raises DataError, naming the row, where nothing is left to learn, there is no mask token, or the tokens of earlier
    turns cannot be told apart.
    """
    return _fitted(example, tokenizer, max_length, masked=masked, turns=turns)[0]


def encode_all(
    examples: Sequence[Example], tokenizer: Any, limit: int, *, masked: bool = False, turns: str = TURNS[0]
) -> tuple[list[Row], RowCounts]:
    """The rows of examples, in their order, and what became of them. limit: the most tokens of a row."""
    fitted = [_fitted(example, tokenizer, limit, masked=masked, turns=turns) for example in examples]
    return [row for row, _ in fitted], counted(fitted, limit)


def counted(fitted: Sequence[tuple[Row, int]], limit: int) -> RowCounts:
    """What became of examples: each as a row of at most `limit` tokens, and how many it had before it was cut."""
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
    """A row, and how many tokens it had before it was cut."""
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
    # nothing precedes the first token, and in a padded batch it must not be guessed from padding
    labels[:1] = [IGNORED]
    if all(label == IGNORED for label in labels):
        raise DataError(f"{example.where}: no token of the completion can be learnt within {max_length} tokens")
    return {"input_ids": ids, "labels": labels}, length


def earlier_turns(example: Example) -> list[int]:
    """Numbers of the messages by the assistant that train beside the completion."""
    return [
        i
        for i in range(example.context, len(example.messages))
        if example.messages[i]["role"] == "assistant" and i not in example.skipped
    ]


def _labelled(example: Example, tokenizer: Any, ids: list[int], turns: list[int]) -> list[int]:
    """Labels of a prompt, [len(ids)]: the tokens of these turns, IGNORED elsewhere."""
    if not tokenizer.chat_template:
        spans = _plain_spans(example, turns)
    elif _GENERATION.search(_template(example, tokenizer)):
        spans = _marked_spans(example, tokenizer, turns)
    else:
        spans = _added_spans(example, tokenizer, turns)
    trains = _overlapping(example, tokenizer, ids, spans)
    return [token if train else IGNORED for token, train in zip(ids, trains, strict=True)]


def _plain_spans(example: Example, turns: list[int]) -> list[tuple[int, int]]:
    """Where these turns stand in the text of a prompt without a chat template."""
    lengths = [len(message["content"]) for message in example.messages]
    starts = [0, *itertools.accumulate(length + len(_JOIN) for length in lengths)]
    return [(starts[i], starts[i] + lengths[i]) for i in turns]


def _marked_spans(example: Example, tokenizer: Any, turns: list[int]) -> list[tuple[int, int]]:
    """The same where the chat template marks what the assistant says."""
    # apply_chat_template's mask of tokens runs on to the end where a mark ends in white space that is no token
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        conversations=[_spelt(example.messages, example, tokenizer)],
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
    """The same where it does not: what each turn adds to the text of the messages before it."""
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
                "tokens cannot be told apart; `turns=last` trains the last turn only"
            )
        spans.append((len(before), len(after)))
    return spans


def _overlapping(example: Example, tokenizer: Any, ids: list[int], spans: list[tuple[int, int]]) -> list[bool]:
    """Which tokens share a character with one of the spans."""
    if not tokenizer.is_fast:
        raise DataError(
            f"{example.where}: the tokenizer does not say where its tokens stand, so those of earlier turns cannot be "
            "told apart; `turns=last` trains the last turn only"
        )
    text = _rendered(example, tokenizer) if tokenizer.chat_template else plain_text(example, tokenizer)
    special = not tokenizer.chat_template
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"][: len(ids)]
    return [start < end and any(start < last and end > first for first, last in spans) for start, end in offsets]


def plain_text(example: Example, tokenizer: Any) -> str:
    """The messages of a prompt without a chat template: their contents, one a line. Raises DataError for tools."""
    more = {"tool_calls", *THOUGHTS}
    if example.tools or example.answer is not None or any(more & message.keys() for message in example.messages):
        raise DataError(f"{example.where}: tools and thoughts need a chat template, and the tokenizer has none")
    return _JOIN.join(message["content"] for message in example.messages)


def _template(example: Example, tokenizer: Any) -> str:
    """The text of the chat template that these messages go through; empty where there is none."""
    if not tokenizer.chat_template:
        return ""
    template: str = tokenizer.get_chat_template(None, list(example.tools) or None)
    return template


def _check_template(example: Example, tokenizer: Any) -> None:
    """Raise DataError for tools, calls and thoughts that the chat template would leave out without a word."""
    messages = [*example.messages, *([] if example.answer is None else [example.answer])]
    wanted = ["tools"] * bool(example.tools)
    wanted += [name for name in ("tool_calls", *THOUGHTS) if any(name in message for message in messages)]
    for name in wanted:
        if name not in _template(example, tokenizer):
            raise DataError(f'{example.where}: the chat template has no place for "{name}"')


def _spelt(messages: Sequence[Message], example: Example, tokenizer: Any) -> list[Message]:
    """Messages with their contents in the form that the chat template takes: texts, or lists of parts."""
    if not _takes_parts(tokenizer, _template(example, tokenizer)):
        return list(messages)
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


@lru_cache(maxsize=8)
def _takes_parts(tokenizer: Any, template: str) -> bool:
    """Whether a chat template leaves a text out and writes it where it is a part, as those of vision models do."""
    text = "a text of the user"
    for content in (text, [{"type": "text", "text": text}]):
        # templates are programs of the model's author and raise what they like
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
        return tokenizer.apply_chat_template(_spelt(messages, example, tokenizer), **settings)
    except Exception as error:  # templates are programs of the model's author and raise what they like
        raise DataError(
            f"{example.where}: the chat template refuses these messages ({said(str(error), 200)[1:-1]})"
        ) from None


def _rendered(example: Example, tokenizer: Any, messages: list[Message] | None = None, *, asks: bool = True) -> str:
    """Messages, or those of the prompt, as the chat template writes them; asks: and the beginning of an answer."""
    chosen = list(example.messages) if messages is None else messages
    text: str = _applied(example, tokenizer, chosen, tokenize=False, add_generation_prompt=asks)
    return text


def _templated_answer(example: Example, tokenizer: Any) -> str:
    """What the chat template adds to the prompt for the answer, without the end-of-sequence token."""
    assert example.answer is not None
    if not tokenizer.chat_template:
        return plain_text(example, tokenizer)
    _check_template(example, tokenizer)
    before = _rendered(example, tokenizer) if example.messages else ""
    after = _rendered(example, tokenizer, [*example.messages, example.answer], asks=False)
    if not after.startswith(before):
        raise DataError(f"{example.where}: the chat template does not go on from the prompt to the answer")
    return after[len(before) :].rstrip().removesuffix(tokenizer.eos_token or "").rstrip()


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
    Packed rows (packing.py) come without an attention_mask: transformers then reads from position_ids, which begin
    again at 0, that no token attends to another example. A token of padding is an example of its own.
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
            inputs["use_cache"] = False  # with a cache, positions are not looked at
    elif "position_ids" in accepts:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if "logits_to_keep" in accepts:
        # the first label of the window is predicted from the column before it
        first = int((labels != IGNORED).any(0).nonzero()[0])
        keep = min(length, length - first + 1)
        inputs["logits_to_keep"] = keep
        labels = labels[:, -keep:].contiguous()  # some models view them as one axis
    inputs["labels"] = labels
    return inputs


def accepted_arguments(model: nn.Module) -> frozenset[str]:
    """Names of the arguments that the model's forward takes; of an adapted model those of the model inside."""
    inner: Any = model.get_base_model if hasattr(model, "get_base_model") else None  # peft's
    inner = model if inner is None else inner()
    names = frozenset(inspect.signature(inner.forward).parameters)
    return names - {"position_ids"} if first_position(inner) else names


def first_position(model: nn.Module) -> int:
    """The position of the first token, where a model numbers its tokens itself: after that of padding, as RoBERTa does.

    0 for all other models, which take positions as they are given.
    """
    tables = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None
    ]
    return max(tables, default=0)
