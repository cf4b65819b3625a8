"""The shards of a model folder: which tensors each contains, and its header."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from taskvec_formats import Form
from taskvec_formats.container import parse_header, shard_header, widest_first
from taskvec_formats.file_names import SINGLE

from .output import Output


@dataclass(frozen=True)
class Shard:
    """A file of tensors.

    Attributes:
        header: The header, including the length prefix.
        tensors: Tensor name -> form in the result before any rounding, in the order of the data.
    """

    header: bytes
    tensors: Mapping[str, Form]


def arrange(shards: Mapping[str, Shard], output: Output) -> dict[str, Shard]:
    """Return the shards that are written instead of those of a result.

    Args:
        shards: File name -> Shard of the result.
        output: How the result is written.

    Returns:
        File name -> Shard.
    """
    if output.shard_size is None:
        return {file: _in_dtype(shard, output) for file, shard in shards.items()}
    tensors = ((name, form) for shard in shards.values() for name, form in shard.tensors.items())
    filled = _filled(tensors, output, output.shard_size)
    names = [f"model-{i + 1:05}-of-{len(filled):05}.safetensors" for i in range(len(filled))]
    return {
        file: _shard(part, {"format": "pt"}, output)
        for file, part in zip(names if len(filled) > 1 else [SINGLE], filled, strict=True)
    }


def tensor_bytes(form: Form, output: Output) -> int:
    """Return the number of bytes of a tensor in its file."""
    return form.size * output.form(form).dtype.itemsize


def file_bytes(shard: Shard, output: Output) -> int:
    """Return the number of bytes of a shard's file."""
    return len(shard.header) + sum(tensor_bytes(form, output) for form in shard.tensors.values())


def _filled(tensors: Iterable[tuple[str, Form]], output: Output, limit: int) -> list[dict[str, Form]]:
    """Distribute the tensors over shards in order. A shard ends if the next tensor would exceed the limit."""
    filled: list[dict[str, Form]] = [{}]
    size = 0
    for name, form in tensors:
        length = tensor_bytes(form, output)
        if filled[-1] and size + length > limit:
            filled.append({})
            size = 0
        filled[-1][name] = form
        size += length
    return filled


def _in_dtype(shard: Shard, output: Output) -> Shard:
    """Return the shard in the output dtype. Its header is unchanged if no dtype changes."""
    if all(output.form(form) == form for form in shard.tensors.values()):
        return shard
    return _shard(shard.tensors, parse_header(shard.header)[0], output)


def _shard(tensors: Mapping[str, Form], metadata: dict[str, str], output: Output) -> Shard:
    written = {name: output.form(form) for name, form in tensors.items()}
    return Shard(shard_header(written, metadata), {name: tensors[name] for name in widest_first(written)})
