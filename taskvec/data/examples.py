"""Examples to train and evaluate on: one of each row of data, whatever form it has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .conversations import THOUGHTS, Message, alpaca_prompt, read_messages, read_sharegpt, read_tools, weighed
from .sources import find_files, read_tables

_FORMS = (
    '{"messages": [...]}, {"conversations": [...]}, {"prompt", "completion"}, {"instruction", "input", "output"} '
    'or {"text"}'
)


@dataclass(frozen=True)
class Example:
    """One row of data.

    messages: the conversation up to the completion, as chat templates take it; empty for plain text.
    completion: what the model should say; for plain text all of it.
    where: "file:line" or "file, row number", for messages.
    context: how many of the messages are the prompt and never train; the assistant's turns after them may.
    answer: the last message as chat templates take it, where it is more than `completion`: it calls tools, or has
        thoughts.
    tools: descriptions of functions, for the chat template.
    skipped: numbers of messages that do not train, wherever they stand.
    """

    messages: tuple[Message, ...]
    completion: str
    where: str
    context: int = 0
    answer: Message | None = None
    tools: tuple[dict[str, Any], ...] = ()
    skipped: frozenset[int] = frozenset()


def check_examples(path: Path) -> list[Path]:
    """The files that `path` stands for. Raises UsageError where no data can be read (`sources.find_files`)."""
    return find_files(path)


def read_examples(path: Path) -> list[Example]:
    """Read a file, a folder of files, or a data set of the Hub (`sources.read_tables`).

    Raises UsageError where there is nothing to read, DataError, naming file and row, for a row that has none of the
    forms or nothing to learn from.
    """
    return [example_of(row, where) for table in read_tables(path) for where, row in table.rows]


def example_of(item: object, where: str) -> Example:
    """One row as an example. Where it has the columns of several forms, the first in the order of `_FORMS` is taken.

    where: how messages name the row. Raises DataError for a row that has none of the forms or nothing to learn from.
    """
    if not isinstance(item, dict):
        raise DataError(f"{where}: expected {_FORMS}, found {type(item).__name__}")
    row = {key: value for key, value in item.items() if value is not None}
    prompt, completion = row.get("prompt"), row.get("completion")
    instruction, context, output = row.get("instruction"), row.get("input", ""), row.get("output")
    tools = row.get("tools") or ()
    if "messages" in row:
        example = _conversation(read_messages(row["messages"], "messages", where), 0, tools, "messages", where)
    elif "conversations" in row:
        example = _conversation(read_sharegpt(row["conversations"], where), 0, tools, "conversations", where)
    elif (
        isinstance(prompt, (str, list))
        and isinstance(completion, (str, list))
        and list in map(type, (prompt, completion))
    ):
        before, after = (
            [{"role": role, "content": row[column]}]
            if isinstance(row[column], str)
            else read_messages(row[column], column, where)
            for column, role in (("prompt", "user"), ("completion", "assistant"))
        )
        if not after:
            raise DataError(f"{where}: the completion is empty")
        example = _conversation(before + after, len(before), tools, "completion", where)
    elif isinstance(prompt, str) and isinstance(completion, str):
        example = Example(({"role": "user", "content": prompt},), completion, where)
    elif isinstance(instruction, str) and isinstance(context, str) and isinstance(output, str):
        example = Example(({"role": "user", "content": alpaca_prompt(instruction, context)},), output, where)
    elif isinstance(row.get("text"), str):
        example = Example((), row["text"], where)
    else:
        raise DataError(f"{where}: expected {_FORMS}, found the keys {sorted(map(str, item))}")
    if not example.completion.strip() and example.answer is None:
        raise DataError(f"{where}: the completion is empty")
    _check_characters(example)
    return example


def _conversation(messages: list[Message], context: int, tools: object, column: str, where: str) -> Example:
    messages, skipped = weighed(messages, where)
    if not messages or messages[-1]["role"] != "assistant":
        found = f"the last is by {messages[-1]['role']!r}" if messages else "found none"
        raise DataError(f'{where}: "{column}" must be a list of messages, the last by the assistant; {found}')
    if len(messages) == 1:
        raise DataError(f"{where}: the assistant speaks first, and learns an answer to something only")
    *before, last = messages
    described = read_tools(tools, where) if tools else ()
    answer = last if last.keys() & {"tool_calls", *THOUGHTS} else None
    return Example(tuple(before), last["content"], where, context, answer, described, skipped)


def _check_characters(example: Example) -> None:
    """Raise DataError for text that is no Unicode text, and for tools whose description nests too deeply to be read."""
    try:
        for text in (example.completion, *_texts([*example.messages, example.answer, *example.tools])):
            text.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(
            f"{example.where}: {half!a} is half of a surrogate pair, which stands for no character"
        ) from None
    except RecursionError:
        raise DataError(f"{example.where}: its tools are nested too deeply") from None


def _texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for each in value:
            yield from _texts(each)
        if isinstance(value, dict):
            for each in value.values():
                yield from _texts(each)
