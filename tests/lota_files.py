"""`.lota` files from a plain description, and bad ones that are in order but for one defect."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from taskvec_formats import Base, LotaReader, LotaWriter, SparseTensor, TensorSpec
from taskvec_formats.container import SafetensorsFile, encode_header
from taskvec_formats.dtypes import DTYPES
from taskvec_formats.header import DIGEST_KEY, KEY, stream_names

Content = dict[str, Any]
Document = dict[str, Any]
Streams = dict[str, bytes]
_IDENTITY = ("name", "shape", "eligible", "base", "tuned")


def read(path: Path) -> Content:
    """What a file says, as JSON: the values of every entry as hexadecimal bits, most significant digit first."""
    reader = LotaReader(path)
    return {
        "base": vars(reader.header.base),
        "provenance": reader.header.provenance,
        "tensors": [
            {
                **{field: getattr(spec, field) for field in _IDENTITY},
                "shape": list(spec.shape),
                "dtype": spec.dtype.name,
                "delta": _to_json(reader.delta(name)),
                "exceptions": _to_json(reader.exceptions(name)),
            }
            for name, spec in reader.specs.items()
        ],
    }


def write(path: Path, content: Content) -> None:
    """The inverse of `read`."""
    with LotaWriter(path, Base(**content["base"]), content["provenance"]) as writer:
        for item in content["tensors"]:
            dtype, shape = DTYPES[item["dtype"]], tuple(item["shape"])
            spec = TensorSpec(**{field: item[field] for field in _IDENTITY} | {"dtype": dtype, "shape": shape})
            delta = _from_json(item["delta"], shape, np.dtype("<u4"))
            writer.add(
                spec,
                SparseTensor(shape, delta.indices, delta.values.view("<f4")),
                _from_json(item["exceptions"], shape, dtype.carrier),
            )


def _to_json(tensor: SparseTensor) -> dict[str, list[Any]]:
    size = tensor.values.itemsize
    bits = [f"{number:0{2 * size}x}" for number in tensor.values.view(f"<u{size}").tolist()]
    return {"indices": tensor.indices.tolist(), "bits": bits}


def _from_json(entries: dict[str, list[Any]], shape: tuple[int, ...], carrier: np.dtype[Any]) -> SparseTensor:
    values = np.array([int(bits, 16) for bits in entries["bits"]], carrier)
    return SparseTensor(shape, np.array(entries["indices"], np.int64), values)


def take_apart(path: Path) -> tuple[Document, Streams]:
    """The description and the stored streams of a `.lota` file, to be altered and put together again."""
    file = SafetensorsFile(path)
    return json.loads(file.metadata[KEY]), {name: bytes(file.bytes(name)) for name in file.tensors}


def sign(document: Document, streams: Streams) -> None:
    """Give every described stream the checksum of the bytes that are stored for it."""
    for tensor in document["tensors"]:
        for part in ("delta", "exceptions"):
            if tensor[part]:
                for kind, name in zip(("positions", "values"), stream_names(tensor["name"], part), strict=True):
                    tensor[part][kind]["crc32"] = f"{zlib.crc32(streams.get(name, b'')):08x}"


def put_together(path: Path, description: Document | str, streams: Streams) -> Path:
    """A file whose container and whose digest of the description are right, whatever the description says."""
    text = description if isinstance(description, str) else json.dumps(description)
    layout = {name: ("U8", (len(data),), len(data)) for name, data in streams.items()}
    metadata = {KEY: text, DIGEST_KEY: hashlib.sha256(text.encode()).hexdigest()}
    path.write_bytes(encode_header(layout, metadata) + b"".join(streams.values()))
    return path
