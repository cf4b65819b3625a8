"""Examples to train and evaluate on, one per row of data, in any of the supported formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments import said
from ..errors import DataError
from .conversations import (
    THOUGHTS,
    Message,
    alpaca_prompt,
    quoted,
    read_messages,
    read_sharegpt,
    read_text,
    read_tools,
    weighed,
)
from .sources import find_files, read_tables

_FORMS = (
    '{"messages": [...]}, {"conversations": [...]}, {"prompt", "completion"}, {"instruction", "input", "output"} '
    'or {"text"}'
)
_CONVERSATIONS = ("messages", "conversations")
# the columns that a row of each form has
_COLUMNS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"), ("text",))


@dataclass(frozen=True)
class Example:
    """One row of data.

    Attributes:
        messages: The conversation before the completion, in the format of chat templates; empty for plain text.
        completion: The text that the model learns to generate; for plain text, all of it.
        where: "file:line" or "file, row number", for messages.
        context: Number of messages that are the prompt and never train. The assistant's turns after them may.
        answer: The last message in the format of chat templates, if it has tool calls or reasoning besides
            `completion`.
        tools: Descriptions of functions, for the chat template.
        skipped: Indices of messages that do not train.
    """

    messages: tuple[Message, ...]
    completion: str
    where: str
    context: int = 0
    answer: Message | None = None
    tools: tuple[dict[str, Any], ...] = ()
    skipped: frozenset[int] = frozenset()


def check_examples(path: Path) -> list[Path]:
    """Check that data can be read, without reading it.

    Args:
        path: A file, a folder of files or a Hub id.

    Returns:
        The files (`sources.find_files`).

    Raises:
        UsageError: There is no data to read.
    """
    return find_files(path)


def read_examples(path: Path) -> list[Example]:
    """Read the examples of a file, a folder of files, or a data set of the Hub.

    Args:
        path: A file, a folder of files or a Hub id (`sources.read_tables`).

    Raises:
        UsageError: There is no data to read.
        DataError: A row has none of the supported formats, or nothing to learn. The message names file and row.
    """
    return [example_of(row, where) for table in read_tables(path) for where, row in table.rows]


def example_of(item: object, where: str) -> Example:
    """Convert a row to an example. If it has the columns of several formats, the first one in `_FORMS` is used.

    Args:
        item: The row.
        where: Name of the row, for messages.

    Raises:
        DataError: The row has none of the supported formats, a value of a wrong type, or nothing to learn.
    """
    if not isinstance(item, dict):
        raise DataError(f"{where}: expected {_FORMS}, found {quoted(item)}")
    row = {key: value for key, value in item.items() if value is not None}
    # if no form is complete, a column of one that is null is reported
    form = _form_of(row) or _form_of(item)
    if form is None:
        raise DataError(f"{where}: expected {_FORMS}, found the keys {said(sorted(map(str, item)), 200)}")
    *_, learned = form
    tools = row.get("tools") or ()
    if learned == "messages":
        example = _conversation(read_messages(item[learned], learned, where), 0, tools, learned, where)
    elif learned == "conversations":
        example = _conversation(read_sharegpt(item[learned], where), 0, tools, learned, where)
    elif learned == "completion":
        example = _completion(item["prompt"], item["completion"], tools, where)
    elif learned == "output":
        instruction, output = (read_text(item[column], f'"{column}"', where) for column in form)
        context = read_text(row.get("input", ""), '"input"', where)
        example = Example(({"role": "user", "content": alpaca_prompt(instruction, context)},), output, where)
    else:
        example = Example((), read_text(item["text"], '"text"', where), where)
    if not example.completion.strip() and example.answer is None:
        raise DataError(f"{where}: the {'last message' if learned in _CONVERSATIONS else learned} is empty")
    _check_characters(example)
    return example


def _form_of(row: Mapping[str, object]) -> tuple[str, ...] | None:
    """The columns of the first form that a row has all columns of."""
    return next((columns for columns in _COLUMNS if row.keys() >= set(columns)), None)


def _completion(prompt: object, completion: object, tools: object, where: str) -> Example:
    for column, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, (str, list)):
            raise DataError(f'{where}: "{column}" must be text or a list of messages, found {quoted(value)}')
    if isinstance(prompt, str) and isinstance(completion, str):
        return Example(({"role": "user", "content": prompt},), completion, where)
    before, after = (
        [{"role": role, "content": value}] if isinstance(value, str) else read_messages(value, column, where)
        for column, value, role in (("prompt", prompt, "user"), ("completion", completion, "assistant"))
    )
    if not after:
        raise DataError(f"{where}: the completion is empty")
    return _conversation(before + after, len(before), tools, "completion", where)


def _conversation(messages: list[Message], context: int, tools: object, column: str, where: str) -> Example:
    messages, skipped = weighed(messages, where)
    if not messages or messages[-1]["role"] != "assistant":
        found = f"the last is by {messages[-1]['role']!r}" if messages else "found none"
        raise DataError(f'{where}: "{column}" must be a list of messages, the last by the assistant; {found}')
    if len(messages) == 1:
        raise DataError(f"{where}: the assistant speaks first, and there is no message to answer")
    *before, last = messages
    described = read_tools(tools, where) if tools else ()
    answer = last if last.keys() & {"tool_calls", *THOUGHTS} else None
    return Example(tuple(before), last["content"], where, context, answer, described, skipped)


def _check_characters(example: Example) -> None:
    """Raise DataError for text that is not valid Unicode, and for tools that are nested too deeply."""
    try:
        for text in (example.completion, *_texts([*example.messages, example.answer, *example.tools])):
            text.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(f"{example.where}: {half!a} is half of a surrogate pair, which is not a character") from None
    except RecursionError:
        raise DataError(f"{example.where}: its tools are nested too deeply") from None


def _texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value, including keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for each in value:
            yield from _texts(each)
        if isinstance(value, dict):
            for each in value.values():
                yield from _texts(each)
