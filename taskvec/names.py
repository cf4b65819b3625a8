"""Layer and module of a tensor, parsed from its name."""

from __future__ import annotations

import re

# longer numbers are not layer numbers, and Python refuses to convert numbers of thousands of digits
_LAYER = re.compile(r"(?:^|\.)([0-9]{1,9})\.")
_EXPERT = re.compile(r"(?<=\.)\d+(?=\.|$)")


def layer_and_module(name: str) -> tuple[int | None, str]:
    """Split a tensor name into the index of its transformer block and its module inside the block.

    The first number in the name is the block. Later numbers, such as those of experts, become "*".

    Args:
        name: The tensor name.

    Returns:
        The index and the module: "model.layers.3.self_attn.q_proj.weight" gives (3, "self_attn.q_proj"). A tensor
        outside the blocks gives (None, its name without ".weight").
    """
    found = _LAYER.search(name)
    rest = (name[found.end() :] if found else name).removesuffix(".weight")
    return (int(found[1]), _EXPERT.sub("*", f".{rest}").lstrip(".")) if found else (None, rest)


def stack_and_layer(name: str) -> tuple[str, int] | None:
    """Split a tensor name at its transformer block into the prefix and the index of the block.

    A number at the beginning of a name counts modules, not layers, and is skipped.

    Args:
        name: The tensor name.

    Returns:
        The prefix and the index: "model.layers.3.self_attn.q_proj.weight" gives ("model.layers", 3). None for a tensor
        outside the blocks.
    """
    found = _LAYER.search(name, 1)
    return (name[: found.start()], int(found[1])) if found else None
