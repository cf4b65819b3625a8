"""Output options of a model folder: shard sizes, dtypes, and the side files that depend on them."""

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
# names of dtypes in transformers -> in safetensors
TARGETS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

Values = npt.NDArray[Any]
# side files by name: the content, or the file to copy
Files = dict[str, Path | bytes]


@dataclass(frozen=True)
class Shard:
    """A file of tensors.

    Attributes:
        header: The header, including the length prefix.
        tensors: Tensor name -> form in the result before any rounding, in the order of the data.
    """

    header: bytes
    tensors: Mapping[str, Form]


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
            one_of("dtype", self.dtype, list(TARGETS))
        if self.card is not None:
            instance("card", self.card, str)

    def form(self, form: Form) -> Form:
        """Return the form in which a tensor is written."""
        return Form(DTYPES[TARGETS[self.dtype]], form.shape) if self.dtype and form.dtype.additive else form

    def shards(self, shards: Mapping[str, Shard]) -> dict[str, Shard]:
        """Return the shards that are written instead of those of a result.

        Args:
            shards: File name -> Shard of the result.

        Returns:
            File name -> Shard.
        """
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
        """Distribute the tensors over shards in order. A shard ends if the next tensor would exceed the limit."""
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
        """Return the shard in the output dtype. Its header is unchanged if no dtype changes."""
        if all(self.form(form) == form for form in shard.tensors.values()):
            return shard
        return self._shard(shard.tensors, parse_header(shard.header)[0])

    def _shard(self, tensors: Mapping[str, Form], metadata: dict[str, str]) -> Shard:
        written = {name: self.form(form) for name, form in tensors.items()}
        return Shard(shard_header(written, metadata), {name: tensors[name] for name in widest_first(written)})

    def _length(self, form: Form) -> int:
        return form.size * self.form(form).dtype.itemsize

    def length(self, shard: Shard) -> int:
        """Return the number of bytes of a shard's file."""
        return len(shard.header) + sum(map(self._length, shard.tensors.values()))

    def rounded(self, name: str, bits: BitArray, form: Form) -> BitArray:
        """Round a range of a tensor to the output dtype.

        Args:
            name: The tensor, for the error message.
            bits: Carriers [n].
            form: The form of the tensor.

        Returns:
            New carriers [n], or `bits` itself if the dtype does not change.

        Raises:
            DTypeError: A finite value becomes infinite.
        """
        if self.form(form) == form:
            return bits
        return self.rounded_values(name, bits.view(form.dtype.real).astype(form.dtype.compute, copy=False), form)

    def rounded_values(self, name: str, values: Values, form: Form) -> BitArray:
        """Round values of a tensor to the output dtype.

        Every NaN becomes the same one, because machines convert NaN payloads differently.

        Args:
            name: The tensor, for the error message.
            values: f32 or f64 [n].
            form: The form of the tensor.

        Returns:
            New carriers [n].

        Raises:
            DTypeError: A finite value becomes infinite.
        """
        target = self.form(form).dtype
        result = round_to(target, values, name)
        result[np.isnan(values)] = np.nan
        carriers: BitArray = result.view(target.carrier)
        return carriers

    def files(self, files: Files, owner: str) -> Files:
        """Return the side files that are written instead of those of a result, without a new index.

        Args:
            files: The side files of the result.
            owner: The name of the model, for the error message.

        Raises:
            UsageError: A dtype is given for a quantised model.
            CheckpointError: config.json is not an object.
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
        """Return the index of the shards, if it differs from the one among the files.

        Args:
            files: The side files that are written.
            shards: The shards that are written.
            lacking: Whether none of the files is an index that fits the shards of the result.

        Returns:
            The index by its file name, or nothing.
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
            raise UsageError(f"{owner} is quantised ({CONFIG} has a quantization_config): its dtype cannot be changed")
        # older models use "torch_dtype", newer ones "dtype"
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        return _json({**config, **dict.fromkeys(keys, self.dtype)})


AS_IT_IS = Output()


def round_to(dtype: DType, values: Values, name: str) -> Values:
    """Round values to a dtype, to nearest with ties to even; f64 is rounded through f32, as in torch.

    Args:
        dtype: A floating-point dtype.
        values: f32 or f64 [n], a range of a tensor.
        name: The name of the tensor, for the error message.

    Returns:
        A new array of values of the dtype.

    Raises:
        DTypeError: A finite value becomes infinite.
    """
    with np.errstate(all="ignore"):
        result: Values = values.astype(dtype.compute, copy=False).astype(dtype.real)
    beyond = np.flatnonzero(np.isinf(result) & np.isfinite(values))
    if len(beyond):
        names = {target: option for option, target in TARGETS.items()}
        raise DTypeError(
            f"tensor {name!r} contains {values[beyond[0]]:g}, which is beyond {names.get(dtype.name, dtype.name)}"
        )
    return result


def content_of(file: Path | bytes) -> bytes:
    """Return the content of a side file."""
    return file if isinstance(file, bytes) else file.read_bytes()


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()
