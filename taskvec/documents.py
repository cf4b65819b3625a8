"""A safe YAML reader for untrusted files: no aliases, no tags, bounded size and nesting."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import yaml

from .arguments import shown
from .errors import UsageError

LARGEST = 1 << 16  # bytes; a typical recipe has a few hundred
DEEPEST = 16  # levels of nested collections; a recipe has six
_STRING = "tag:yaml.org,2002:str"


def read_document(path: Path) -> Any:
    """Read the single document of a YAML file.

    Args:
        path: The file.

    Returns:
        The document, made of dicts, lists, strings, numbers, booleans and None. Dates stay strings.

    Raises:
        UsageError: The file is missing or not a regular file, too large, not UTF-8 or not YAML; is nested too deeply;
            or has anchors, aliases, tags, keys that are not text, or duplicate keys. The message does not name the
            file.
    """
    text = _text(path)
    try:
        _check(text)
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"it is not YAML: {_one_line(error)}") from None
    except (ValueError, ArithmeticError):
        raise UsageError(
            "it cannot be read as YAML: it contains a number with too many digits or without any"
        ) from None


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
            raise UsageError(f"it is larger than {LARGEST:,} bytes, the largest size that is allowed")
        return content.decode("utf-8")
    except FileNotFoundError:
        raise UsageError("no such file") from None
    except UnicodeDecodeError:
        raise UsageError("it cannot be read as UTF-8 text") from None
    except (OSError, ValueError) as error:  # a path with a zero byte is a ValueError
        raise UsageError(f"it cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _check(text: str) -> None:
    """Check the parser events of a document before anything is built from them. This needs no recursion."""
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
                raise UsageError(f"line {line}: more than {DEEPEST} levels of nested lists and mappings")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _one_line(error: yaml.YAMLError) -> str:
    """Return the problem and its position. The full text of the error would quote the file."""
    problem = " ".join(str(getattr(error, "problem", None) or getattr(error, "reason", None) or "").split())
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{place}{problem[:160] or type(error).__name__}"


class _Loader(yaml.SafeLoader):
    """A loader that refuses keys that are not text, and duplicate keys, of which YAML would use the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != _STRING:
                found = shown(key.value) if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
                raise yaml.constructor.ConstructorError(
                    None, None, f"a key must be text, found {found}", key.start_mark
                )
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
