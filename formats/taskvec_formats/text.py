"""Text from files, made safe for where it is shown. Imports nothing of this package.

Names of tensors, files and checkpoints, and everything in a provenance, come from whoever wrote a file. A terminal
obeys escape sequences, Markdown renders HTML and links, and JSON has no NaN.
"""

from __future__ import annotations

import html
import json
import math
import re
from typing import Any

LINE = 1000  # characters of an error message
# what begins markup inside a line: "_" does at the edge of a word only, "://" and "www." are links by themselves
_MARKDOWN = re.compile(r"[\\`*\[\]#!|~@$^]|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\.", re.IGNORECASE)


def printable(text: object, most: int = LINE) -> str:
    r"""One line of text that a terminal can show.

    Control characters, line breaks, bidirectional controls and lone surrogates become escapes such as ``\x1b``. Of a
    text of more than `most` characters the middle is left out, so that the end of a sentence survives a long name.
    The result is a fixed point: calling it again changes nothing.

    Args:
        text: Anything; `str` is taken of it.
        most: The largest number of characters returned.
    """
    line = _shortened(str(text), most)  # before escaping, which would make a long text longer still
    if line.isprintable():
        return line
    return _shortened("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line), most)


def _shortened(line: str, most: int) -> str:
    half = (most - 1) // 2
    return line if len(line) <= most else f"{line[:half]}…{line[len(line) - half :]}"


def markdown(text: object, most: int = 200) -> str:
    """The same as literal Markdown inside a line: no markup, HTML, link or line break of the text has an effect.

    Punctuation is escaped by a backslash (CommonMark section 2.4), and `<`, `>` and `&` become entities.
    """
    return html.escape(_MARKDOWN.sub(r"\\\g<0>", printable(text, most)), quote=False)


def json_text(document: Any, indent: int | None = 2) -> str:
    """A document as JSON. NaN and the infinities, which JSON cannot hold, become null."""
    try:
        return json.dumps(document, indent=indent, allow_nan=False)
    except ValueError:  # something in it is not finite
        return json.dumps(_finite(document), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value
