"""Conversion of messages, in the formats that data uses, into those that chat templates take."""

from __future__ import annotations

import json
from typing import Any

from ..arguments import said
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
    expected = f'{where}: "{column}" must be {{"role", "content"}} objects, the last by the assistant'
    if not isinstance(value, list):
        raise DataError(f"{expected}; found {type(value).__name__}")
    messages = []
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict) or not isinstance(item.get("role"), str):
            raise DataError(f"{expected}; message {number} has no role")
        message: Message = {key: value for key, value in item.items() if value is not None and key != "tool_calls"}
        calls = item.get("tool_calls") if item["role"] == "assistant" else None
        content = item.get("content")
        if content is None and not calls:
            raise DataError(f"{expected}; message {number} has no content")
        message["content"] = "" if content is None else _text(content, f"{where}: message {number}")
        if calls:
            message["tool_calls"] = _calls(calls, f"{where}: message {number}")
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
    if not isinstance(value, list):
        raise DataError(f'{where}: "conversations" must be {{"from", "value"}} objects, found {type(value).__name__}')
    items = []
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict) or not isinstance(item.get("value"), str):
            raise DataError(f'{where}: "conversations" must be {{"from", "value"}} objects; message {number} is not')
        speaker = item.get("from")
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            raise DataError(f'{where}: "from" is human, gpt, system or tool, found {said(speaker)} in message {number}')
        message: Message = {"role": _SHAREGPT_ROLES[speaker], "content": item["value"]}
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
            raise DataError(f'{where}: "weight" of message {number + 1} must be 0 or 1, found {said(weight)}')
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
        raise DataError(f'{where}: "tools" must be a list of objects or its JSON text, found {said(value)}')
    return tuple(tools)


def _text(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"{where}: its content must be text or a list of text parts, found {said(content)}")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else part
        if kind != "text" or not isinstance(part.get("text"), str):
            raise DataError(f"{where}: only text parts can be trained on, found a part of type {said(kind)}")
    return "".join(part["text"] for part in content)


def _calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Read tool calls, with their arguments as objects: templates would quote arguments in JSON text again."""
    found = []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f'{where}: "tool_calls" must be a list of {{"function": {{"name", "arguments"}}}} objects')
        arguments = _parsed(function.get("arguments", {}))
        if not isinstance(arguments, dict):
            raise DataError(f"{where}: the arguments of a tool call must be an object, found {said(arguments)}")
        function = {**function, "arguments": arguments}
        found.append({**call, "function": function} if "function" in call else function)
    return found


def _parsed(value: object) -> object:
    """The value of a JSON text. Anything else, including invalid JSON, is returned unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
