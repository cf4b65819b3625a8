"""Examples to train and evaluate on, read from JSON lines."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError, UsageError

_FORMS = '{"prompt", "completion"}, {"messages": [...]} or {"text"}'


@dataclass(frozen=True)
class Example:
    """One line of data.

    messages: the conversation up to the completion, as chat templates take it; empty for plain text.
    completion: what the model should say; for plain text all of it.
    where: "file:line", for messages.
    """

    messages: tuple[dict[str, str], ...]
    completion: str
    where: str


def check_examples(path: Path) -> None:
    """Raise UsageError where no file can be read: a FIFO without a writer would be waited for, a device has no end."""
    if not os.path.exists(path):
        raise UsageError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise UsageError(f"{path} is not a regular file; expected JSON lines")


def read_examples(path: Path) -> list[Example]:
    """Read a JSON-lines file. Blank lines at the very end are allowed, anywhere else they are errors.

    Raises UsageError where there is no such file, DataError, naming file and line, for a line that is not one of the
    three forms or has nothing to learn from.
    """
    check_examples(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error})") from None
    # not splitlines(): JSON strings may hold U+2028 and its like as they are
    lines = text.rstrip().split("\n")
    if lines == [""]:
        raise DataError(f"{path}: the file is empty")
    return [_example(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _example(line: str, where: str) -> Example:
    if not line.strip():
        raise DataError(f"{where}: empty line")
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(item, dict):
        raise DataError(f"{where}: expected {_FORMS}, found {type(item).__name__}")
    if "messages" in item:
        messages = item["messages"]
        fits = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
        if not fits or not messages or messages[-1]["role"] != "assistant":
            raise DataError(f'{where}: "messages" must be {{"role", "content"}} objects, the last by the assistant')
        *prompt, answer = ({"role": m["role"], "content": m["content"]} for m in messages)
        example = Example(tuple(prompt), answer["content"], where)
    elif isinstance(item.get("prompt"), str) and isinstance(item.get("completion"), str):
        example = Example(({"role": "user", "content": item["prompt"]},), item["completion"], where)
    elif isinstance(item.get("text"), str):
        example = Example((), item["text"], where)
    else:
        raise DataError(f"{where}: expected {_FORMS}, found the keys {sorted(item)}")
    if not example.completion.strip():
        raise DataError(f"{where}: the completion is empty")
    try:
        "".join([example.completion, *(text for message in example.messages for text in message.values())]).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(f"{where}: {half!a} is half of a surrogate pair, which stands for no character") from None
    return example
