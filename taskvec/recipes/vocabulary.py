"""Vocabularies of several models, mapped to that of the result: each token gets one row of the embeddings.

A tokenizer file is edited as JSON, so that no other program is needed.
Source: mergekit, docs/tokenizer.md, for the choice of the rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from taskvec_formats import Checkpoint, Form
from taskvec_formats.dtypes import BitArray, DType
from taskvec_formats.text import printable

from ..applying.rounding import round_to
from ..applying.side_files import CONFIG
from ..errors import TokenizerError, UsageError
from ..merging.tokenizers import FAST, TOKENIZER_FILES, vocabulary
from ..names import stack_and_layer
from .assembled import Piece
from .recipe import Token, Tokenizer

Rows = npt.NDArray[np.int64]
# parts of the names of tensors that may have as many rows as there are tokens, but have other rows
_OTHER_ROWS = ("position", "wpe", "token_type", "norm")
_ZERO, _MEAN = -1, -2  # instead of the index of a model: rows of zeros, or the mean of the models with the token


@dataclass(frozen=True)
class Owner:
    """A model with its tokenizer.

    Attributes:
        reference: The model, as the merge file names it.
        checkpoint: The model.
        files: Its side files by name.
    """

    reference: str
    checkpoint: Checkpoint
    files: Mapping[str, bytes]

    @cached_property
    def tokens(self) -> Mapping[str, int]:
        """Token -> row of the embeddings. Tokens beyond the last row are left out.

        Raises:
            UsageError: The model has no tokenizer that can be read, or no vocab_size.
            TokenizerError: A file of the tokenizer is damaged.
        """
        try:
            found = vocabulary(self.files)
        except TokenizerError as error:
            raise TokenizerError(f"{self.reference}: {error}") from None
        if found is None:
            raise UsageError(f"{self.reference} has no {FAST} from which its tokens can be read")
        return {token: row for token, row in found.items() if row < self.size}

    @cached_property
    def size(self) -> int:
        """The number of rows of the embeddings, from the configuration.

        A model of text and sound or images may have several vocabularies. That of the text is the largest.

        Raises:
            UsageError: There is none, or no tensor has as many rows.
        """
        config = json_object(self.files.get(CONFIG), f"{self.reference}: {CONFIG}")
        parts = (config, *(value for value in config.values() if isinstance(value, dict)))
        found: list[int] = [part["vocab_size"] for part in parts if type(part.get("vocab_size")) is int]
        if not found:
            raise UsageError(f"{self.reference}: {CONFIG} has no vocab_size")
        rows = {self._rows(name) for name in self.checkpoint.tensors}
        sizes = [size for size in found if size > 0 and size in rows]
        if not sizes:
            raise UsageError(f"{self.reference}: {CONFIG} has vocab_size {max(found)}, but no tensor has as many rows")
        return max(sizes)

    def _rows(self, name: str) -> int | None:
        """The rows of a tensor outside of the layers that may have one for each token."""
        shape = self.checkpoint.tensors[name].shape
        outside = stack_and_layer(name) is None and not any(part in name for part in _OTHER_ROWS)
        return shape[0] if outside and shape else None

    def has_rows(self, name: str) -> bool:
        """Return whether a tensor has one row for each token: embeddings, and the head with its bias."""
        return self._rows(name) == self.size


class Vocabulary:
    """The vocabulary of the result.

    Args:
        tokenizer: The choice of the merge file.
        owners: Reference -> model with its tokenizer.
        start: The reference of the base, or of the model that the result resembles.

    Attributes:
        tokens: Token -> row.
        size: The number of rows.
        files: The files of the tokenizer, by name.
        source: The model whose tokenizer files these are, before tokens were added.

    Raises:
        UsageError: The tokenizer cannot be extended, or a model has none.
        TokenizerError: A tokenizer file is damaged.
    """

    def __init__(self, tokenizer: Tokenizer, owners: Mapping[str, Owner], start: str) -> None:
        self._choice = tokenizer
        self._owners = owners
        self.source = owners[start if tokenizer.source in ("base", "union") else tokenizer.source]
        wanted = list(self.source.tokens)
        document = None
        is_longer = len(vocabulary(self.source.files) or {}) > len(wanted)
        if (
            is_longer
            or tokenizer.source == "union"
            or any(token not in self.source.tokens for token in tokenizer.tokens)
        ):
            document = json_object(self.source.files.get(FAST), f"{self.source.reference}: {FAST}")
            if is_longer:
                _strip(document, self.source)
            others = [owner for reference, owner in owners.items() if reference != start]
            extra = _extra_tokens(self.source, others) if tokenizer.source == "union" else {}
            extra |= {token: _added(token) for token in tokenizer.tokens if token not in extra}
            added = {token: entry for token, entry in extra.items() if token not in self.source.tokens}
            _add(document, added, self.source)
            self.tokens = {**self.source.tokens, **{entry["content"]: entry["id"] for entry in added.values()}}
        else:
            self.tokens = {token: self.source.tokens[token] for token in wanted}
        self.files = {name: self.source.files[name] for name in TOKENIZER_FILES if name in self.source.files}
        if document is not None:
            self.files[FAST] = as_json(document)
        count = len(self.tokens)
        multiple = tokenizer.multiple or 1
        self.size = -(-max(count, 1 + max(self.tokens.values(), default=-1)) // multiple) * multiple

    @property
    def keeps_rows(self) -> bool:
        """Whether every model has the same rows as the result."""
        forced = any(token.force for token in self._choice.tokens.values())
        return not forced and all(
            owner.size == self.size and all(owner.tokens.get(token) == row for token, row in self.tokens.items())
            for owner in self._owners.values()
        )

    def mapped(self, inputs: Sequence[tuple[str, str]], base: str | None, dtype: DType) -> list[Piece]:
        """Return a tensor of several models with the rows of the result.

        Args:
            inputs: (reference, tensor) of each model.
            base: The reference of the base, or None.
            dtype: The dtype of the result.

        Raises:
            UsageError: A model has no row for a token whose embedding should come from it.
        """
        owners = [self._owners[reference] for reference, _ in inputs]
        sources = [_Rows(owner.checkpoint, own, dtype) for owner, (_, own) in zip(owners, inputs, strict=True)]
        plan = _Plan(self, owners, self._choice.tokens, base)
        shape = (self.size, *owners[0].checkpoint.tensors[inputs[0][1]].shape[1:])
        form = Form(dtype, shape)
        return [Piece(form, _Gathered(form, sources, *plan.rows(number), plan.held)) for number in range(len(inputs))]

    def owner(self, reference: str) -> Owner:
        """Return a model that a token names as the source of its embedding."""
        if reference not in self._owners:
            raise UsageError(f"tokenizer: {printable(reference, 80)} is not one of the models")
        return self._owners[reference]


class _Plan:
    """Which row of which model becomes each row of the result."""

    def __init__(
        self, vocabulary: Vocabulary, owners: Sequence[Owner], choices: Mapping[str, Token], base: str | None
    ) -> None:
        self._size = vocabulary.size
        self.held = np.full((len(owners), vocabulary.size), -1, np.int64)  # row of each model, or -1
        for place, owner in enumerate(owners):
            for token, row in vocabulary.tokens.items():
                self.held[place, row] = owner.tokens.get(token, -1)
        present = self.held >= 0
        count = present.sum(axis=0)
        first = np.argmax(present, axis=0)
        at = next((i for i, owner in enumerate(owners) if owner.reference == base), None)
        in_base = present[at] if at is not None else np.zeros(vocabulary.size, bool)
        chosen = np.where(count == 0, _ZERO, np.where(count == 1, first, np.where(in_base, at or 0, _MEAN)))
        rows = np.where(chosen >= 0, self.held[np.maximum(chosen, 0), np.arange(vocabulary.size)], -1)
        self._forced = np.zeros(vocabulary.size, bool)
        references = [owner.reference for owner in owners]
        for token, choice in choices.items():
            row = vocabulary.tokens[token]
            self._forced[row] = choice.force
            if choice.source == "zero":
                chosen[row], rows[row] = _ZERO, -1
            elif choice.source is not None:
                owner = vocabulary.owner(choice.source)
                if owner.reference not in references:
                    raise UsageError(f"tokenizer: token {printable(token, 80)}: {owner.reference} is not merged here")
                chosen[row], rows[row] = references.index(owner.reference), _row_of(owner, token, choice)
        self._chosen, self._rows = chosen, rows
        self.unused = np.ones(vocabulary.size, bool)
        self.unused[list(vocabulary.tokens.values())] = False

    def rows(self, number: int) -> tuple[Rows, Rows, Any]:
        """The models and rows that become the rows of one model, and the rows that are the mean of all others."""
        own = (self.held[number] >= 0) & ~self._forced
        return np.where(own, number, self._chosen), np.where(own, self.held[number], self._rows), self.unused


def _row_of(owner: Owner, token: str, choice: Token) -> int:
    wanted = token if choice.token is None else choice.token
    row = owner.tokens.get(wanted) if isinstance(wanted, str) else wanted
    if row is None or not 0 <= row < owner.size:
        raise UsageError(
            f"tokenizer: token {printable(token, 80)}: {owner.reference} has no token {printable(str(wanted), 80)}"
        )
    return row


class _Rows:
    """Reads rows of a tensor as values of a dtype."""

    def __init__(self, checkpoint: Checkpoint, name: str, dtype: DType) -> None:
        self._checkpoint, self._name, self._dtype = checkpoint, name, dtype
        form = checkpoint.tensors[name].form
        self._own = form.dtype
        self.width = form.size // form.shape[0] if form.shape[0] else 0

    def __call__(self, rows: Rows) -> npt.NDArray[Any]:
        """Return rows as values, [rows, width]. Consecutive rows are read at once."""
        width = self.width
        found = np.empty((len(rows), width), self._dtype.real)
        edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        for low, high in pairwise(edges):
            bits = self._checkpoint.bits(self._name, int(rows[low]) * width, (int(rows[high - 1]) + 1) * width)
            values = bits.view(self._own.real)
            if self._own != self._dtype:
                values = round_to(self._dtype, values.astype(self._own.compute), self._name)
            found[low:high] = values.reshape(-1, width)
        return found


class _Gathered:
    """A tensor whose rows come from several models, read range by range.

    Args:
        form: Its dtype and shape.
        sources: The models.
        models: The index of the model of each row, _ZERO or _MEAN.
        rows: The row in that model.
        unused: The rows that belong to no token, which are the mean of all others.
        held: The row of each token in each model, or -1.
    """

    def __init__(self, form: Form, sources: Sequence[_Rows], models: Rows, rows: Rows, unused: Any, held: Rows) -> None:
        self._form, self._sources, self._models, self._rows = form, sources, models, rows
        self._unused, self._held = unused, held

    def __call__(self, start: int, stop: int) -> BitArray:
        width = max(1, self._sources[0].width)
        first, end = start // width, -(-stop // width)
        found = self._values(np.arange(first, end))
        flat: BitArray = found.reshape(-1).view(self._form.dtype.carrier)
        return flat[start - first * width : stop - first * width]

    def _values(self, places: Rows) -> npt.NDArray[Any]:
        found = np.zeros((len(places), self._sources[0].width), self._form.dtype.real)
        for number, source in enumerate(self._sources):
            own = np.flatnonzero(self._models[places] == number)
            if len(own):
                found[own] = source(self._rows[places[own]])
        for place in np.flatnonzero(self._models[places] == _MEAN):
            found[place] = self._mean_of_models(int(places[place]))
        spare = np.flatnonzero(self._unused[places])
        if len(spare):
            found[spare] = self._mean
        return found

    def _mean_of_models(self, row: int) -> npt.NDArray[Any]:
        having = [number for number in range(len(self._sources)) if self._held[number, row] >= 0]
        dtype = self._form.dtype
        total = np.zeros(self._sources[0].width, dtype.real)
        for number in having:
            own = self._sources[number](self._held[number, row : row + 1])[0]
            total = (total.astype(dtype.compute) + own.astype(dtype.compute)).astype(dtype.real)
        mean: npt.NDArray[Any] = (total.astype(dtype.compute) / np.float32(len(having))).astype(dtype.real)
        return mean

    @cached_property
    def _mean(self) -> npt.NDArray[Any]:
        """The mean of all rows of tokens, summed in f64."""
        used = np.flatnonzero(~self._unused)
        total = np.zeros(self._sources[0].width, np.float64)
        for low in range(0, len(used), 4096):
            total += self._values(used[low : low + 4096]).astype(np.float64).sum(axis=0)
        mean: npt.NDArray[Any] = (
            (total / max(1, len(used))).astype(self._form.dtype.compute).astype(self._form.dtype.real)
        )
        return mean


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


def _entries(owner: Owner) -> dict[str, dict[str, Any]]:
    """The added tokens of a tokenizer.json: token -> entry."""
    content = owner.files.get(FAST)
    listed = json_object(content, f"{owner.reference}: {FAST}").get("added_tokens") if content else None
    return {
        each["content"]: each
        for each in listed or []
        if isinstance(each, dict) and isinstance(each.get("content"), str)
    }


def _extra_tokens(source: Owner, others: Sequence[Owner]) -> dict[str, dict[str, Any]]:
    """The tokens of other models that a model lacks: the plain ones, then the added ones, each in the order of rows."""
    plain: dict[str, dict[str, Any]] = {}
    special: dict[str, dict[str, Any]] = {}
    for owner in others:
        entries = _entries(owner)
        for token, _ in sorted(owner.tokens.items(), key=lambda item: item[1]):
            if token in entries:
                special.setdefault(token, entries[token])
            elif token not in source.tokens:
                plain.setdefault(token, _added(token))
    return {**plain, **{token: entry for token, entry in special.items() if token not in source.tokens}}


def _added(token: str) -> dict[str, Any]:
    """An entry of tokenizer.json for an added token, as `add_tokens` of transformers makes it."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {"id": 0, "content": token, **flags, "normalized": True, "special": False}


def _strip(document: dict[str, Any], source: Owner) -> None:
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


def _add(document: dict[str, Any], added: dict[str, dict[str, Any]], source: Owner) -> None:
    """Append tokens to a tokenizer.json, with the next free numbers."""
    listed = document.setdefault("added_tokens", [])
    if not isinstance(listed, list):
        raise TokenizerError(f"{source.reference}: {FAST}: added_tokens should be a list of tokens")
    following = 1 + max(source.tokens.values(), default=-1)
    for number, token in enumerate(added, following):
        added[token] = {**added[token], "id": number}
        listed.append(added[token])
