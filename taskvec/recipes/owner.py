"""A model of a merge file with its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from taskvec_formats import Checkpoint

from ..applying.side_files import CONFIG
from ..errors import TokenizerError, UsageError
from ..merging.tokenizers import FAST, vocabulary
from ..names import stack_and_layer
from .json_files import json_object

# parts of the names of tensors that may have as many rows as there are tokens, but have other rows
_OTHER_ROWS = ("position", "wpe", "token_type", "norm")


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
