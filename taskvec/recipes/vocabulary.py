"""Vocabularies of several models, mapped to that of the result: each token gets one row of the embeddings.

Source: mergekit, docs/tokenizer.md, for the choice of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from taskvec_formats import Form
from taskvec_formats.dtypes import DType
from taskvec_formats.text import printable

from ..errors import UsageError
from ..merging.tokenizers import FAST, TOKENIZER_FILES, vocabulary
from .assembled import Piece
from .json_files import as_json, json_object
from .owner import Owner
from .recipe import Token, Tokenizer
from .rows import MEAN, ZERO, Gathered, RowReader, Rows
from .tokenizer_json import added_token, append_tokens, extra_tokens, strip_tokens


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
                strip_tokens(document, self.source)
            others = [owner for reference, owner in owners.items() if reference != start]
            extra = extra_tokens(self.source, others) if tokenizer.source == "union" else {}
            extra |= {token: added_token(token) for token in tokenizer.tokens if token not in extra}
            added = {token: entry for token, entry in extra.items() if token not in self.source.tokens}
            append_tokens(document, added, self.source)
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
        sources = [RowReader(owner.checkpoint, own, dtype) for owner, (_, own) in zip(owners, inputs, strict=True)]
        plan = _Plan(self, owners, self._choice.tokens, base)
        shape = (self.size, *owners[0].checkpoint.tensors[inputs[0][1]].shape[1:])
        form = Form(dtype, shape)
        return [Piece(form, Gathered(form, sources, *plan.rows(number), plan.held)) for number in range(len(inputs))]

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
        chosen = np.where(count == 0, ZERO, np.where(count == 1, first, np.where(in_base, at or 0, MEAN)))
        rows = np.where(chosen >= 0, self.held[np.maximum(chosen, 0), np.arange(vocabulary.size)], -1)
        self._forced = np.zeros(vocabulary.size, bool)
        references = [owner.reference for owner in owners]
        for token, choice in choices.items():
            row = vocabulary.tokens[token]
            self._forced[row] = choice.force
            if choice.source == "zero":
                chosen[row], rows[row] = ZERO, -1
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
