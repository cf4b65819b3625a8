"""Reading a YAML document of a stranger: no aliases, no tags, bounded in size and nesting."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import yaml

from .arguments import shown
from .errors import UsageError

LARGEST = 1 << 16  # bytes; a recipe has some hundreds
DEEPEST = 16  # collections within one another; a recipe has six
_STRING = "tag:yaml.org,2002:str"


def read_document(path: Path) -> Any:
    """The one document in a YAML file, of dicts, lists, text, numbers, truth values and None; dates are text.

    Raises:
        UsageError: The file is missing or no file, too large, not UTF-8 or not YAML, is nested too deeply, has anchors,
            aliases, tags, or keys that are not text or are given twice. The message does not name the file.
    """
    text = _text(path)
    try:
        _check(text)
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"it is not YAML: {_one_line(error)}") from None
    except (ValueError, ArithmeticError):
        raise UsageError("it is not YAML that can be read: it holds a number of too many digits, or of none") from None


def _text(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UsageError("it is a folder; expected a YAML file")
        if not stat.S_ISREG(mode):
            raise UsageError("it is not a regular file; expected a YAML file")
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise UsageError(f"it is larger than {LARGEST:,} bytes, the most that such a file may have")
        return content.decode("utf-8")
    except FileNotFoundError:
        raise UsageError("no such file") from None
    except UnicodeDecodeError:
        raise UsageError("it cannot be read as UTF-8 text") from None
    except (OSError, ValueError) as error:  # a path with a zero byte is a ValueError
        raise UsageError(f"it cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _check(text: str) -> None:
    """Go through the events of a document, which takes no recursion, before anything is built from them."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise UsageError(f"line {line}: anchors and aliases are not supported: write the value out")
        if (tag := getattr(event, "tag", None)) is not None:
            raise UsageError(f"line {line}: tags such as !!bool are not supported, found {shown(tag)}")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST:
                raise UsageError(f"line {line}: more than {DEEPEST} lists and mappings within one another")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _one_line(error: yaml.YAMLError) -> str:
    """What is wrong and where. The error itself quotes the file."""
    problem = " ".join(str(getattr(error, "problem", None) or getattr(error, "reason", None) or "").split())
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{place}{problem[:160] or type(error).__name__}"


class _Loader(yaml.SafeLoader):
    """Refuses keys that are not text, and those that are given twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != _STRING:
                found = shown(key.value) if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
                raise yaml.constructor.ConstructorError(None, None, f"a key is text, found {found}", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown(key.value)} is given twice", key.start_mark
                )
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
