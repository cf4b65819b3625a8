"""Numbers that may differ from tensor to tensor: by layer, by name. The rules are mergekit's.

https://github.com/arcee-ai/mergekit/blob/main/README.md#parameter-specification
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ..arguments import real, shown
from ..errors import UsageError
from ..names import stack_and_layer
from ..vectors.layers import counted, most

Gradient: TypeAlias = Sequence[float]


@dataclass(frozen=True)
class Rule:
    """A value for the tensors whose name contains `filter`; None or "*" is all of them."""

    value: float | Gradient
    filter: str | None = None


# one number; a gradient over the layers; or rules, of which the first that fits counts
Setting: TypeAlias = float | Gradient | Sequence[Rule]


class Depth:
    """How deep each tensor lies in its model, in [0, 1]: where gradients are read.

    Layer i of the n layers of a stack (`taskvec.layers`) lies at i / (n − 1), or at 1 where there is only one. Tensors
    outside of layers, such as embeddings, final norms and heads, lie at 0.
    Source: mergekit's planner, which gives t = 0 to all tensors that are in no layer.
    """

    def __init__(self, names: Iterable[str], layers: Mapping[str, int] | None = None) -> None:
        """Take the layers from the names of tensors, and from `layers`, stack -> number, where that is larger."""
        self.layers = most([counted(names), layers or {}])

    def __call__(self, name: str) -> float:
        place = stack_and_layer(name)
        if place is None:
            return 0.0
        stack, layer = place
        last = self.layers.get(stack, 0) - 1
        return layer / last if last > 0 else 1.0


def resolve(setting: Setting, name: str, depth: float) -> float | None:
    """The number that holds for a tensor; None where no rule fits its name.

    A gradient of m numbers is read by linear interpolation at depth · (m − 1).
    """
    if not isinstance(setting, Sequence):
        return float(setting)
    for value in setting:
        if not isinstance(value, Rule):
            return _interpolated([float(each) for each in setting], depth)  # type: ignore[arg-type]
        if value.filter is None or value.filter == "*" or value.filter in name:
            return resolve(value.value, name, depth)
    return None


def _interpolated(values: Sequence[float], depth: float) -> float:
    place = depth * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return (1 - (place - low)) * values[low] + (place - low) * values[high]


def has_gradient(setting: object) -> bool:
    """Whether a setting may differ from layer to layer."""
    if isinstance(setting, Rule):
        return has_gradient(setting.value)
    if not isinstance(setting, Sequence):
        return False
    if any(isinstance(each, Rule) for each in setting):
        return any(map(has_gradient, setting))
    return any(each != setting[0] for each in setting)


def numbers_of(setting: object, what: str = "setting") -> list[float]:
    """Every number in a setting.

    Args:
        setting: A number, a gradient or rules.
        what: The name of the setting, for errors.

    Raises:
        UsageError: It is none of these, or holds a number that is not finite.
    """
    if isinstance(setting, Rule):
        if not isinstance(setting.filter, str | None):
            raise UsageError(f"{what}: the filter of a rule is text, found {shown(setting.filter)}")
        return numbers_of(setting.value, what)
    if isinstance(setting, Sequence) and not isinstance(setting, str):
        kinds = {isinstance(each, Rule) for each in setting}
        if len(kinds) != 1 or any(isinstance(each, Sequence) for each in setting):
            raise UsageError(
                f"{what}: a setting is a number, a list of numbers or a list of rules, found {shown(setting)}"
            )
        return [number for each in setting for number in numbers_of(each, what)]
    return [number_of(setting, what)]


def number_of(value: object, what: str) -> float:
    """A finite number as a float: Python's and numpy's numbers, fractions and decimals, but no truth values.

    Raises:
        UsageError: It is something else, or too large for a float.
    """
    if not isinstance(value, (bool, np.bool_)):
        with suppress(UsageError):
            number = real(what, value)
            if math.isfinite(number):
                return number
    raise UsageError(f"{what}: expected a finite number, found {shown(value)}")


def described(setting: object) -> Any:
    """A setting as JSON."""
    if isinstance(setting, Rule):
        return {"filter": setting.filter, "value": described(setting.value)}
    if isinstance(setting, Sequence):
        return [described(each) for each in setting]
    # numbers of numpy are not JSON, those of Python stay as they were given
    return setting if isinstance(setting, int) or type(setting) is float else number_of(setting, "setting")
