"""Which files of a model folder are weights, and which names a `.lota` file may give to a file.

docs/format.md, section 3. A name comes from whoever wrote the file: it must not lead out of the folder, and a side file
must not be what a program that loads the model takes for its weights, or for the way to them.
"""

from __future__ import annotations

import re

from .errors import HeaderError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD = ".safetensors"
# formats of weights and of pickled objects; an index of such files is named after their format
WEIGHTS = (
    *(SHARD, ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".hdf5", ".keras", ".msgpack", ".onnx"),
    *(".onnx_data", ".ot", ".pdparams", ".tflite", ".npz", ".pkl", ".pickle", ".joblib", ".lota"),
)
# names an adapter, and with it another base that transformers would load instead of the folder's weights
REDIRECT = "adapter_config.json"
_INDEX_OF = re.compile(r"\.index(\.[^.]+)?\.json$")  # transformers puts a variant's name before ".json"
_LONGEST = 255  # bytes that file systems take
_NOT_A_NAME = re.compile(r"\.{0,2}|.*[/\\\x00-\x1f\x7f-\x9f].*", re.DOTALL)


def is_weights(name: str) -> bool:
    """Whether a file holds weights, or says where others are: all that is not a side file, shards included.

    Case does not matter, as on some file systems. INDEX alone is a side file: it is checked against the shards.
    """
    lower = name.lower()
    if lower == INDEX:
        return name != INDEX
    return _INDEX_OF.sub("", lower).endswith(WEIGHTS) or lower == REDIRECT


def is_config(name: str) -> bool:
    """Whether transformers may take a file for the model's configuration: `config.json`, or `config.4.0.0.json`."""
    return name.startswith("config.") and name.endswith(".json")


def check_side_file_name(name: str) -> None:
    """Raise HeaderError for a name that a side file must not have."""
    _check_plain(name)
    if is_weights(name):
        raise HeaderError(f"{name!r:.80} is the name of a file of weights, not of a side file")


def check_shard_name(name: str) -> None:
    """Raise HeaderError for a name that a shard must not have."""
    _check_plain(name)
    if not name.endswith(SHARD):
        raise HeaderError(f"{name!r:.80} is not the name of a shard: expected a name that ends in {SHARD}")


def _check_plain(name: str) -> None:
    if _NOT_A_NAME.fullmatch(name):
        raise HeaderError(f"{name!r:.80} is not the name of a file")
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise HeaderError(f"{name!r:.80} is not the name of a file: it is not Unicode") from None
    if length > _LONGEST:
        raise HeaderError(f"{name!r:.80} is not the name of a file: it has more than {_LONGEST} bytes")
