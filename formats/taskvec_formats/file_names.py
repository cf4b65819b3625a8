"""Which files of a model folder contain weights, and which file names a `.lota` file may contain.

See docs/format.md, section 3. A `.lota` file may come from an untrusted source. A name in it must not point outside the
folder, and the name of a side file must not be one from which a program would load weights, directly or by reference.
"""

from __future__ import annotations

import re

from .errors import HeaderError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD = ".safetensors"
GGUF = ".gguf"
# extensions of weights and of pickled objects; the name of an index begins with the name of its format
WEIGHTS = (
    *(SHARD, ".bin", ".pt", ".pth", ".ckpt", GGUF, ".ggml", ".h5", ".hdf5", ".keras", ".msgpack", ".onnx"),
    *(".onnx_data", ".ot", ".pdparams", ".tflite", ".npz", ".pkl", ".pickle", ".joblib", ".lota"),
)
# an adapter's configuration names another base, which transformers would load instead of the folder's weights
REDIRECT = "adapter_config.json"
_INDEX_OF = re.compile(r"\.index(\.[^.]+)?\.json$")  # transformers inserts the name of a variant before ".json"
_LONGEST = 255  # limit of common file systems, in bytes
_NOT_A_NAME = re.compile(r"\.{0,2}|.*[/\\\x00-\x1f\x7f-\x9f].*", re.DOTALL)


def is_weights(name: str) -> bool:
    """Return whether a file contains weights or refers to other files of weights, so that it is not a side file.

    Shards count as weights. Case is ignored, as on some file systems. INDEX itself is a side file, because it is
    checked against the shards.

    Args:
        name: Name of the file.
    """
    lower = name.lower()
    if lower == INDEX:
        return name != INDEX
    return _INDEX_OF.sub("", lower).endswith(WEIGHTS) or lower == REDIRECT


def is_config(name: str) -> bool:
    """Return whether transformers may load a file as the model's configuration.

    Such names are `config.json` and, for example, `config.4.0.0.json`.

    Args:
        name: Name of the file.
    """
    return name.startswith("config.") and name.endswith(".json")


def check_side_file_name(name: str) -> None:
    """Check the name of a side file.

    Args:
        name: Name of the file.

    Raises:
        HeaderError: The name is not a plain file name, or is the name of a file of weights.
    """
    _check_plain(name)
    if is_weights(name):
        raise HeaderError(f"{name!r:.80} is the name of a file of weights, not of a side file")


def check_shard_name(name: str) -> None:
    """Check the name of a shard.

    Args:
        name: Name of the file.

    Raises:
        HeaderError: The name is not a plain file name, or does not end in `.safetensors`.
    """
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
