"""How many layers a model has, which is what gradients of settings are read over.

A *stack* is a run of numbered layers: the tensors `model.layers.0.…` to `model.layers.29.…` form the stack
`model.layers` of 30 layers. Encoder and decoder of one model are two stacks.
A vector need not touch the last layer of its base. It then records in its provenance how many layers there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..names import stack_and_layer

KEY = "layers"


def counted(names: Iterable[str]) -> dict[str, int]:
    """Stack -> number of its layers, from the names of a model's tensors."""
    counts: dict[str, int] = {}
    for place in map(stack_and_layer, names):
        if place is not None:
            counts[place[0]] = max(counts.get(place[0], 0), place[1] + 1)
    return counts


def recorded(provenance: Mapping[str, Any]) -> dict[str, int]:
    """Stack -> number of its layers, as a provenance says; what is not a positive whole number is left out."""
    found = provenance.get(KEY)
    if not isinstance(found, dict):
        return {}
    return {stack: count for stack, count in found.items() if type(count) is int and count > 0}


def most(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """For each stack the largest of several counts."""
    merged: dict[str, int] = {}
    for each in counts:
        for stack, count in each.items():
            merged[stack] = max(merged.get(stack, 0), count)
    return merged


def record(names: Iterable[str], counts: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """What a vector adds to its provenance: the layers of the stacks that it touches, but not at their last layer.

    Args:
        names: The tensors of the vector.
        counts: Stack -> number of its layers, of the base.

    Returns:
        `{"layers": {stack: number}}`, or nothing where the tensors of the vector tell it by themselves.
    """
    beyond = {stack: counts[stack] for stack, own in sorted(counted(names).items()) if counts.get(stack, 0) > own}
    return {KEY: beyond} if beyond else {}
