"""Conversion of messages, in the formats that data uses, into those that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ..arguments import shown
from ..errors import DataError

Message = dict[str, Any]
TURNS = ("all", "last")  # the assistant's turns that the loss is computed on
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of the reasoning before an answer
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def read_messages(value: object, column: str, where: str) -> list[Message]:
    """Read a list of {"role", "content"} objects.

    Content is text, or a list of text parts, which are joined. A message by the assistant may have "tool_calls", and
    then no content. Other keys are kept for the chat template, as is "weight", which decides whether a message trains
    (`weighed`).

    Args:
        value: The list.
        column: Name of the column, for messages.
        where: Name of the row, for messages.

    Raises:
        DataError: The value is anything else. The message names the row and the message in it.
    """
    messages = []
    for name, item in _objects(value, '"role", "content"', column, where):
        role = _field(item, "role", name, where)
        message: Message = {key: value for key, value in item.items() if value is not None and key != "tool_calls"}
        calls = item.get("tool_calls") if role == "assistant" else None
        content = item.get("content")
        if content is None and not calls:
            raise DataError(f'{where}: {name} has no "content"')
        message["content"] = "" if content is None else _content(content, name, where)
        if calls:
            message["tool_calls"] = _calls(calls, name, where)
        messages.append(message)
    return messages


def read_sharegpt(value: object, where: str) -> list[Message]:
    """Read a list of {"from", "value"} objects; "from" is human, gpt, system or tool.

    Args:
        value: The list.
        where: Name of the row, for messages.

    Raises:
        DataError: The value is anything else. The message names the row and the message in it.
    """
    items = []
    for name, item in _objects(value, '"from", "value"', "conversations", where):
        content = _field(item, "value", name, where)
        speaker = _field(item, "from", name, where)
        if speaker not in _SHAREGPT_ROLES:
            raise DataError(f'{where}: "from" of {name} must be human, gpt, system or tool, found {quoted(speaker)}')
        message: Message = {"role": _SHAREGPT_ROLES[speaker], "content": content}
        if item.get("weight") is not None:
            message["weight"] = item["weight"]
        items.append(message)
    return items


def weighed(messages: list[Message], where: str) -> tuple[list[Message], frozenset[int]]:
    """Remove "weight" from messages, and find those whose weight is 0, which do not train.

    Messages after the last one by the assistant that trains are dropped, because nothing is learned from them.

    Args:
        messages: The messages of a row. Their "weight" is removed in place.
        where: Name of the row, for messages.

    Returns:
        (messages, indices of the messages that do not train).

    Raises:
        DataError: A weight is neither 0 nor 1, or no message by the assistant trains. The message names the row.
    """
    skipped = set()
    for number, message in enumerate(messages):
        weight = message.pop("weight", 1)
        if isinstance(weight, bool) or weight not in (0, 1):
            raise DataError(f'{where}: "weight" of message {number + 1} must be 0 or 1, found {quoted(weight)}')
        if not weight:
            skipped.add(number)
    if not skipped:
        return messages, frozenset()
    trains = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i not in skipped]
    if not trains:
        raise DataError(f'{where}: no message by the assistant has a "weight" other than 0')
    kept = messages[: trains[-1] + 1]
    return kept, frozenset(number for number in skipped if number < len(kept))


def alpaca_prompt(instruction: str, context: str) -> str:
    """The prompt of Stanford Alpaca, or its variant without an input if `context` is empty.

    Args:
        instruction: The instruction.
        context: The input of the task.
    """
    filled = _ALPACA_WITH_INPUT if context.strip() else _ALPACA
    # not format(): texts may contain braces
    before, _, rest = filled.partition("{instruction}")
    between, _, after = rest.partition("{input}")
    return before + instruction + (between + context + after if context.strip() else rest)


def read_tools(value: object, where: str) -> tuple[dict[str, Any], ...]:
    """Read descriptions of functions, as a list or its JSON text.

    Args:
        value: The list or text.
        where: Name of the row, for messages.

    Raises:
        DataError: The value is anything else.
    """
    tools = _parsed(value)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f'{where}: "tools" must be a list of objects or its JSON text, found {quoted(value)}')
    return tuple(tools)


def read_text(value: object, what: str, where: str) -> str:
    """Read a text.

    Args:
        value: The text.
        what: Name of the value, for messages.
        where: Name of the row, for messages.

    Raises:
        DataError: The value is not a text.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} must be text, found {quoted(value)}")
    return value


def quoted(value: object) -> str:
    """Return a value of a row for an error message.

    Args:
        value: The value.
    """
    return "null" if value is None else shown(value)


def _objects(value: object, keys: str, column: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Iterate over a list of objects with these keys: yields the name of each for messages, and the object."""
    expected = f'{where}: "{column}" must be a list of {{{keys}}} objects'
    if not isinstance(value, list):
        raise DataError(f"{expected}, found {quoted(value)}")
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict):
            raise DataError(f"{expected}, found {quoted(item)} as message {number}")
        yield f'message {number} of "{column}"', item


def _field(item: dict[str, Any], key: str, message: str, where: str) -> str:
    if item.get(key) is None:
        raise DataError(f'{where}: {message} has no "{key}"')
    return read_text(item[key], f'"{key}" of {message}', where)


def _content(content: object, message: str, where: str) -> str:
    what = f'{where}: "content" of {message}'
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"{what} must be text or a list of text parts, found {quoted(content)}")
    texts = []
    for part in content:
        if not isinstance(part, dict):
            raise DataError(f"{what} must be text or a list of text parts, found the part {quoted(part)}")
        if part.get("type") != "text":
            raise DataError(
                f"{what}: only text parts can be trained on, found a part of type {quoted(part.get('type'))}"
            )
        texts.append(read_text(part.get("text"), f'"text" of a part of {message}', where))
    return "".join(texts)


def _calls(calls: object, message: str, where: str) -> list[dict[str, Any]]:
    """Read tool calls, with their arguments as objects: templates would quote arguments in JSON text again."""
    expected = f'{where}: "tool_calls" of {message} must be a list of {{"function": {{"name", "arguments"}}}} objects'
    if not isinstance(calls, list):
        raise DataError(f"{expected}, found {quoted(calls)}")
    read = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{expected}, found the call {quoted(call)}")
        arguments = _parsed(function.get("arguments", {}))
        if not isinstance(arguments, dict):
            raise DataError(
                f'{where}: "arguments" of a tool call of {message} must be an object, found {quoted(arguments)}'
            )
        function = {**function, "arguments": arguments}
        read.append({**call, "function": function} if "function" in call else function)
    return read


def _parsed(value: object) -> object:
    """The value of a JSON text. Anything else, including invalid JSON, is returned unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
