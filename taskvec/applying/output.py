"""How a model folder is written: its shards, the dtype of its tensors, what the files beside them say of both."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from taskvec_formats import Form, SideFile
from taskvec_formats.container import parse_header, shard_header, widest_first
from taskvec_formats.dtypes import DTYPES, BitArray, DType
from taskvec_formats.errors import CheckpointError
from taskvec_formats.file_names import INDEX, SINGLE

from ..arguments import instance, one_of, said, whole
from ..errors import DTypeError, UsageError

CONFIG, CARD = "config.json", "README.md"
# as transformers calls them -> as safetensors does
TARGETS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

Values = npt.NDArray[Any]
# side files by name: the content, or the file to copy
Files = dict[str, Path | bytes]


@dataclass(frozen=True)
class Shard:
    """A file of tensors: its header, length prefix included, and its tensors in the order of their data.

    The forms are those of the result, before any rounding.
    """

    header: bytes
    tensors: Mapping[str, Form]


@dataclass(frozen=True)
class Output:
    """How a result is written.

    shard_size: the most bytes of tensors in a shard; a larger tensor has a shard of its own. The tensors are then laid
        out anew in the order in which they lie, in files named as transformers names them. None keeps the shards.
    dtype: "float32", "bfloat16" or "float16": what every floating tensor is rounded to. None keeps their own.
    card: the text of README.md, None for the base's.
    carried: other side files to write in place of the base's, with their content (tokenizers.Agreement).
    Raises UsageError for a size that is not positive and for another dtype.
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
            one_of("dtype", self.dtype, list(TARGETS))
        if self.card is not None:
            instance("card", self.card, str)

    def form(self, form: Form) -> Form:
        """That in which a tensor is written."""
        return Form(DTYPES[TARGETS[self.dtype]], form.shape) if self.dtype and form.dtype.additive else form

    def shards(self, shards: Mapping[str, Shard]) -> dict[str, Shard]:
        """What is written in place of the shards that a result would have: file name -> Shard."""
        if self.shard_size is None:
            return {file: self._rounded(shard) for file, shard in shards.items()}
        tensors = ((name, form) for shard in shards.values() for name, form in shard.tensors.items())
        filled = self._filled(tensors, self.shard_size)
        names = [f"model-{i + 1:05}-of-{len(filled):05}.safetensors" for i in range(len(filled))]
        return {
            file: self._shard(part, {"format": "pt"})
            for file, part in zip(names if len(filled) > 1 else [SINGLE], filled, strict=True)
        }

    def _filled(self, tensors: Iterable[tuple[str, Form]], limit: int) -> list[dict[str, Form]]:
        """The tensors dealt out in order: a shard ends where the next one would exceed the limit."""
        filled: list[dict[str, Form]] = [{}]
        size = 0
        for name, form in tensors:
            length = self._length(form)
            if filled[-1] and size + length > limit:
                filled.append({})
                size = 0
            filled[-1][name] = form
            size += length
        return filled

    def _rounded(self, shard: Shard) -> Shard:
        """The same shard; its header stays to the byte where no dtype changes."""
        if all(self.form(form) == form for form in shard.tensors.values()):
            return shard
        return self._shard(shard.tensors, parse_header(shard.header)[0])

    def _shard(self, tensors: Mapping[str, Form], metadata: dict[str, str]) -> Shard:
        written = {name: self.form(form) for name, form in tensors.items()}
        return Shard(shard_header(written, metadata), {name: tensors[name] for name in widest_first(written)})

    def _length(self, form: Form) -> int:
        return form.size * self.form(form).dtype.itemsize

    def length(self, shard: Shard) -> int:
        """Bytes of a shard's file."""
        return len(shard.header) + sum(map(self._length, shard.tensors.values()))

    def rounded(self, name: str, bits: BitArray, form: Form) -> BitArray:
        """A range of a tensor of `form` as it is written: the same carriers where its dtype stays, else new ones.

        The errors of `rounded_values`.
        """
        if self.form(form) == form:
            return bits
        return self.rounded_values(name, bits.view(form.dtype.real).astype(form.dtype.compute, copy=False), form)

    def rounded_values(self, name: str, values: Values, form: Form) -> BitArray:
        """Values, f32 or f64 [n], of a tensor of `form` as they are written: new carriers.

        Every NaN becomes the same one: machines convert payloads differently. The errors of `round_to`.
        """
        target = self.form(form).dtype
        result = round_to(target, values, name)
        result[np.isnan(values)] = np.nan
        carriers: BitArray = result.view(target.carrier)
        return carriers

    def files(self, files: Files, owner: str) -> Files:
        """The side files to write in place of those that a result would have; all but an index of its own.

        owner: whose they are, for errors. Raises UsageError for a quantised model that is to have another dtype,
        CheckpointError for a config.json that is not an object.
        """
        written = files | {file.name: file.content for file in self.carried if file.content is not None}
        if self.shard_size is not None:
            written.pop(INDEX, None)
        if self.dtype is not None and CONFIG in written:
            written[CONFIG] = self._config(content_of(written[CONFIG]), owner)
        if self.card is not None:
            written[CARD] = self.card.encode()
        return written

    def index(self, files: Files, shards: Mapping[str, Shard], *, lacking: bool = False) -> Files:
        """The index of these shards, where it has to be another than that among the files.

        lacking: whether there is none among the files that fits the shards of the result.
        """
        sized_anew = self.dtype is not None and INDEX in files
        if not sized_anew and (len(shards) == 1 or (self.shard_size is None and not lacking)):
            return {}
        size = sum(self._length(form) for shard in shards.values() for form in shard.tensors.values())
        places = {name: file for file, shard in shards.items() for name in shard.tensors}
        return {INDEX: _json({"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))})}

    def _config(self, content: bytes, owner: str) -> bytes:
        try:
            config = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{owner}: {CONFIG} is not valid JSON: {error}") from None
        if not isinstance(config, dict):
            raise CheckpointError(f"{owner}: {CONFIG} should be an object, found {config!r:.80}")
        if config.get("quantization_config") is not None:
            raise UsageError(f"{owner} is quantised ({CONFIG} has a quantization_config): its dtype has to stay")
        # older models have the one key, newer ones the other
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        return _json({**config, **dict.fromkeys(keys, self.dtype)})


AS_IT_IS = Output()


def round_to(dtype: DType, values: Values, name: str) -> Values:
    """Values, f32 or f64 [n], rounded to a dtype: to nearest, ties to even; f64 through f32, as torch does.

    Args:
        dtype: Floating.
        values: Those of a range of a tensor.
        name: The tensor's, for errors.

    Returns:
        A new array of the dtype's values.

    Raises:
        DTypeError: A finite value becomes infinite.
    """
    with np.errstate(all="ignore"):
        result: Values = values.astype(dtype.compute, copy=False).astype(dtype.real)
    beyond = np.flatnonzero(np.isinf(result) & np.isfinite(values))
    if len(beyond):
        said_of = {target: asked for asked, target in TARGETS.items()}
        raise DTypeError(
            f"tensor {name!r} holds {values[beyond[0]]:g}, which is beyond {said_of.get(dtype.name, dtype.name)}"
        )
    return result


def content_of(file: Path | bytes) -> bytes:
    """The content of a side file."""
    return file if isinstance(file, bytes) else file.read_bytes()


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()
