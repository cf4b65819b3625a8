"""The number of layers of a model, over which gradients of merge settings are spread.

A *stack* is a run of numbered layers: the tensors `model.layers.0.…` to `model.layers.29.…` form the stack
`model.layers` of 30 layers. The encoder and the decoder of one model are two stacks.
A vector may leave the last layers of its base unchanged. It then records the number of layers in its provenance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..names import stack_and_layer

KEY = "layers"


def counted(names: Iterable[str]) -> dict[str, int]:
    """Count the layers of each stack.

    Args:
        names: The names of a model's tensors.

    Returns:
        Stack -> number of its layers.
    """
    counts: dict[str, int] = {}
    for place in map(stack_and_layer, names):
        if place is not None:
            counts[place[0]] = max(counts.get(place[0], 0), place[1] + 1)
    return counts


def recorded(provenance: Mapping[str, Any]) -> dict[str, int]:
    """Return the layer counts that a provenance records.

    Args:
        provenance: The provenance of a vector. Counts that are not positive whole numbers are ignored.

    Returns:
        Stack -> number of its layers.
    """
    found = provenance.get(KEY)
    if not isinstance(found, dict):
        return {}
    return {stack: count for stack, count in found.items() if type(count) is int and count > 0}


def most(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the largest of several counts for each stack."""
    merged: dict[str, int] = {}
    for each in counts:
        for stack, count in each.items():
            merged[stack] = max(merged.get(stack, 0), count)
    return merged


def record(names: Iterable[str], counts: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Return the provenance entry with the layer counts that the tensors of a vector do not show.

    These are the counts of the stacks that the vector changes, but not in their last layer.

    Args:
        names: The tensors of the vector.
        counts: Stack -> number of its layers, of the base.

    Returns:
        `{"layers": {stack: number}}`, or an empty dictionary if there are no such stacks.
    """
    beyond = {stack: counts[stack] for stack, own in sorted(counted(names).items()) if counts.get(stack, 0) > own}
    return {KEY: beyond} if beyond else {}
