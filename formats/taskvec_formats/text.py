"""Make text from files safe to display in a terminal, in Markdown and in JSON.

The names of tensors, files and checkpoints, and all of a provenance, come from untrusted files. A terminal interprets
escape sequences, Markdown renders HTML and links, and JSON has no NaN. This module imports nothing else from the
package.
"""

from __future__ import annotations

import html
import json
import math
import re
from typing import Any

LINE = 1000  # longest error message, in characters
# starts of inline markup: "_" only at the edge of a word; "://" and "www." because they become links
_MARKDOWN = re.compile(r"[\\`*\[\]#!|~@$^]|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\.", re.IGNORECASE)


def printable(text: object, most: int = LINE) -> str:
    r"""Convert text to one line that is safe to print in a terminal.

    Control characters, line breaks, bidirectional controls and lone surrogates become escapes such as ``\x1b``. If the
    text is longer than `most`, its middle is left out, so that the end of a sentence is kept even after a long name.
    The function is idempotent.

    Args:
        text: Any object, converted with `str`.
        most: Largest number of characters returned.
    """
    line = _shortened(str(text), most)  # before escaping, so that no long text is escaped
    if line.isprintable():
        return line
    return _shortened("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line), most)


def _shortened(line: str, most: int) -> str:
    half = (most - 1) // 2
    return line if len(line) <= most else f"{line[:half]}…{line[len(line) - half :]}"


def markdown(text: object, most: int = 200) -> str:
    """Convert text to one line of literal Markdown, in which no markup, HTML, link or line break has an effect.

    Punctuation is escaped with backslashes (CommonMark section 2.4), and `<`, `>` and `&` become entities.

    Args:
        text: Any object, converted with `str`.
        most: Largest number of characters before escaping.
    """
    return html.escape(_MARKDOWN.sub(r"\\\g<0>", printable(text, most)), quote=False)


def json_text(document: Any, indent: int | None = 2) -> str:
    """Serialize a document as JSON. NaN and the infinities, which JSON does not support, become null.

    Args:
        document: The document.
        indent: Spaces per level, None for a single line.
    """
    try:
        return json.dumps(document, indent=indent, allow_nan=False)
    except ValueError:  # it contains NaN or an infinity
        return json.dumps(_finite(document), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value
