"""Write the golden `.lota` files anew; read README.md first."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lota_files import Document, Streams, put_together, sign, take_apart, write

from taskvec_formats.container import encode_header

FOLDER = Path(__file__).parent
GOOD = FOLDER / "valid" / "f32-exact.lota"
# RFC 8878: magic; an 8-byte content size follows; window; 2^40 bytes; one last, empty raw block
HUGE_FRAME = b"\x28\xb5\x2f\xfd\xc0\x00" + struct.pack("<Q", 1 << 40) + b"\x01\x00\x00"


def _values(streams: Streams) -> str:
    return next(name for name in streams if name.endswith("/delta.values"))


def _positions(streams: Streams) -> str:
    return next(name for name in streams if name.endswith("/delta.positions"))


FROM_BYTES: dict[str, Callable[[bytes], bytes]] = {
    "NotSafetensorsError-empty": lambda data: b"",
    "NotSafetensorsError-truncated": lambda data: data[:-1],
    "NotSafetensorsError-bytes-after-the-end": lambda data: data + b"\0",
    "NotLotaError-plain-safetensors": lambda data: encode_header({"w": ("U8", (1,), 1)}, {"format": "pt"}) + b"x",
    "ChecksumError-flipped-bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "ChecksumError-altered-description": lambda data: data.replace(b"made_by", b"made_of"),
}
FROM_DESCRIPTION: dict[str, Callable[[Document], Any]] = {
    "VersionError-9.9": lambda document: document.update(version="9.9"),
    "HeaderError-unknown-codec": lambda document: document["tensors"][0]["delta"]["values"].update(codec="pickle"),
    "HeaderError-unknown-dtype": lambda document: document["tensors"][0].update(dtype="F4"),
    "HeaderError-unknown-field": lambda document: document.update(trust_remote_code=True),
    "HeaderError-tensor-twice": lambda document: document["tensors"].append(document["tensors"][0]),
    "HeaderError-more-entries-than-elements": lambda document: document["tensors"][0]["delta"].update(count=7),
    "StreamError-other-count": lambda document: document["tensors"][0]["delta"].update(count=2),
    "StreamError-position-beyond-the-end": lambda document: document["tensors"][0].update(shape=[5]),
}
FROM_TEXT: dict[str, Callable[[str], str]] = {
    "HeaderError-duplicate-key": lambda text: text.replace('"kind"', '"kind": "vector", "kind"'),
    "HeaderError-not-json": lambda text: text[:-1],
}
FROM_STREAMS: dict[str, Callable[[Streams], Any]] = {
    "HeaderError-missing-stream": lambda streams: streams.pop(_values(streams)),
    "HeaderError-extra-stream": lambda streams: streams.update({"x/delta.values": b"x"}),
    "StreamError-trailing-byte": lambda streams: streams.update({_values(streams): streams[_values(streams)] + b"\0"}),
    "StreamError-gap-width-3": lambda streams: streams.update(
        {_positions(streams): b"\3" + streams[_positions(streams)][1:]}
    ),
    "StreamError-huge-frame": lambda streams: streams.update(
        {_positions(streams): b"\1" + struct.pack("<Q", len(HUGE_FRAME)) + HUGE_FRAME}
    ),
}


def invalid_files(scratch: Path) -> dict[str, bytes]:
    """Stem of the file name -> content."""
    files = {name: alter(GOOD.read_bytes()) for name, alter in FROM_BYTES.items()}
    for name, edit in FROM_DESCRIPTION.items():
        document, streams = take_apart(GOOD)
        edit(document)
        files[name] = put_together(scratch, document, streams).read_bytes()
    for name, replace in FROM_TEXT.items():
        document, streams = take_apart(GOOD)
        files[name] = put_together(scratch, replace(json.dumps(document)), streams).read_bytes()
    for name, change in FROM_STREAMS.items():
        document, streams = take_apart(GOOD)
        change(streams)
        sign(document, streams)
        files[name] = put_together(scratch, document, streams).read_bytes()
    return files


def main() -> None:
    for described in sorted((FOLDER / "valid").glob("*.json")):
        write(described.with_suffix(".lota"), json.loads(described.read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory() as folder:
        for name, content in invalid_files(Path(folder) / "scratch.lota").items():
            (FOLDER / "invalid" / f"{name}.lota").write_bytes(content)


if __name__ == "__main__":
    main()
