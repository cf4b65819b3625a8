"""Tokens added to a tokenizer.json, and removed from it. The file is edited as JSON, without the package tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import TokenizerError, UsageError
from ..merging.tokenizers import FAST
from .json_files import json_object
from .owner import Owner


def _entries(owner: Owner) -> dict[str, dict[str, Any]]:
    """The added tokens of a tokenizer.json: token -> entry."""
    content = owner.files.get(FAST)
    listed = json_object(content, f"{owner.reference}: {FAST}").get("added_tokens") if content else None
    return {
        each["content"]: each
        for each in listed or []
        if isinstance(each, dict) and isinstance(each.get("content"), str)
    }


def extra_tokens(source: Owner, others: Sequence[Owner]) -> dict[str, dict[str, Any]]:
    """The tokens of other models that a model lacks: the plain ones, then the added ones, each in the order of rows."""
    plain: dict[str, dict[str, Any]] = {}
    special: dict[str, dict[str, Any]] = {}
    for owner in others:
        entries = _entries(owner)
        for token, _ in sorted(owner.tokens.items(), key=lambda item: item[1]):
            if token in entries:
                special.setdefault(token, entries[token])
            elif token not in source.tokens:
                plain.setdefault(token, added_token(token))
    return {**plain, **{token: entry for token, entry in special.items() if token not in source.tokens}}


def added_token(token: str) -> dict[str, Any]:
    """An entry of tokenizer.json for an added token, as `add_tokens` of transformers makes it."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {"id": 0, "content": token, **flags, "normalized": True, "special": False}


def strip_tokens(document: dict[str, Any], source: Owner) -> None:
    """Remove the tokens from a tokenizer.json that have no row in the embeddings."""
    model = document.get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(words, dict):
        raise UsageError(f"{source.reference}: {FAST} has tokens beyond the {source.size} rows of the embeddings")
    gone = {token for token, row in words.items() if row >= source.size}
    model["vocab"] = {token: row for token, row in words.items() if token not in gone}
    if gone and isinstance(model.get("merges"), list):
        pairs = [(pair, pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        model["merges"] = [pair for pair, parts in pairs if gone.isdisjoint(parts) and "".join(parts) not in gone]
    document["added_tokens"] = [
        each
        for each in document.get("added_tokens") or []
        if isinstance(each, dict) and each.get("id", 0) < source.size
    ]


def append_tokens(document: dict[str, Any], added: dict[str, dict[str, Any]], source: Owner) -> None:
    """Append tokens to a tokenizer.json, with the next free numbers."""
    listed = document.setdefault("added_tokens", [])
    if not isinstance(listed, list):
        raise TokenizerError(f"{source.reference}: {FAST}: added_tokens should be a list of tokens")
    following = 1 + max(source.tokens.values(), default=-1)
    for number, token in enumerate(added, following):
        added[token] = {**added[token], "id": number}
        listed.append(added[token])
