"""JSON files of models: read with errors that name the file, and written."""

from __future__ import annotations

import json
from typing import Any

from ..errors import TokenizerError, UsageError


def json_object(content: bytes | None, what: str) -> dict[str, Any]:
    """Parse a file that must be a JSON object.

    Raises:
        UsageError: The file is missing.
        TokenizerError: It is not a JSON object.
    """
    if content is None:
        raise UsageError(f"{what} does not exist")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise TokenizerError(f"{what}: expected an object, found {document!r:.80}")
    return document


def as_json(document: Any) -> bytes:
    """Return a document as the text of a JSON file."""
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only escape
        return (json.dumps(document, indent=2) + "\n").encode()
