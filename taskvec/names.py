"""Reading layer and module out of a tensor's name."""

from __future__ import annotations

import re

# a number of more digits is no layer's, and Python does not convert one of thousands
_LAYER = re.compile(r"(?:^|\.)([0-9]{1,9})\.")
_EXPERT = re.compile(r"(?<=\.)\d+(?=\.|$)")


def layer_and_module(name: str) -> tuple[int | None, str]:
    """Split a tensor name into the index of its transformer block and its place inside the block.

    "model.layers.3.self_attn.q_proj.weight" gives (3, "self_attn.q_proj"). The first number is the block; later ones
    (experts) become "*". A tensor outside the blocks gives (None, its name without ".weight").
    """
    found = _LAYER.search(name)
    rest = (name[found.end() :] if found else name).removesuffix(".weight")
    return (int(found[1]), _EXPERT.sub("*", f".{rest}").lstrip(".")) if found else (None, rest)


def stack_and_layer(name: str) -> tuple[str, int] | None:
    """Split a tensor name at its transformer block: what comes before the number, and the number.

    "model.layers.3.self_attn.q_proj.weight" gives ("model.layers", 3); a tensor outside the blocks, None. A number that
    begins a name counts modules, not layers, and is passed over.
    """
    found = _LAYER.search(name, 1)
    return (name[: found.start()], int(found[1])) if found else None
