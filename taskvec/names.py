"""Reading layer and module out of a tensor's name."""

from __future__ import annotations

import re

_LAYER = re.compile(r"(?:^|\.)(\d{1,9})\.")  # longer numbers count nothing
_EXPERT = re.compile(r"(?<=\.)\d+(?=\.|$)")


def layer_and_module(name: str) -> tuple[int | None, str]:
    """Split a tensor name into the index of its transformer block and its place inside the block.

    "model.layers.3.self_attn.q_proj.weight" gives (3, "self_attn.q_proj"). The first number is the block; later ones
    (experts) become "*". A tensor outside the blocks gives (None, its name without ".weight").
    """
    found = _LAYER.search(name)
    rest = (name[found.end() :] if found else name).removesuffix(".weight")
    return (int(found[1]), _EXPERT.sub("*", f".{rest}").lstrip(".")) if found else (None, rest)
