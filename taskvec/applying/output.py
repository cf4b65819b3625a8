"""Output options of a model folder: shard size, dtype, and files that replace the base's."""

from __future__ import annotations

from dataclasses import dataclass

from taskvec_formats import Form, SideFile
from taskvec_formats.dtypes import DTYPES

from ..arguments import instance, one_of, said, whole
from ..errors import UsageError

# names of dtypes in transformers -> in safetensors
TARGETS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Output:
    """Options for writing a result.

    Attributes:
        shard_size: The largest number of bytes of tensors in a shard. A larger tensor gets a shard of its own. The
            tensors are divided into new shards in their present order, with the file names that transformers uses. None
            keeps the shards.
        dtype: "float32", "bfloat16" or "float16", to which every floating-point tensor is rounded. None keeps the
            dtypes.
        card: The text of README.md. None keeps the base's.
        carried: Other side files that replace the base's, with their content (tokenizers.Agreement).

    Raises:
        UsageError: The shard size is not positive, or the dtype is another one.
    """

    shard_size: int | None = None
    dtype: str | None = None
    card: str | None = None
    carried: tuple[SideFile, ...] = ()

    def __post_init__(self) -> None:
        if self.shard_size is not None:
            object.__setattr__(self, "shard_size", whole("shard_size", self.shard_size))
            if self.shard_size < 1:
                raise UsageError(f"a shard needs a size of at least 1 byte, found {said(self.shard_size)}")
        if self.dtype is not None:
            one_of("`dtype`", self.dtype, list(TARGETS))
        if self.card is not None:
            instance("card", self.card, str)

    def form(self, form: Form) -> Form:
        """Return the form in which a tensor is written."""
        return Form(DTYPES[TARGETS[self.dtype]], form.shape) if self.dtype and form.dtype.additive else form


AS_IT_IS = Output()
