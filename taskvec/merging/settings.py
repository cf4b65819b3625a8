"""Settings: numbers that may depend on the layer and on the name of a tensor, with mergekit's rules.

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
    """A value for the tensors whose name contains a string.

    Attributes:
        value: A number, or a gradient over the layers.
        filter: The string. None and "*" match all tensors.
    """

    value: float | Gradient
    filter: str | None = None


@dataclass(frozen=True)
class Resolved:
    """A setting whose number is known for each tensor.

    Attributes:
        numbers: Tensor name -> number.
        setting: The setting that gives these numbers.
    """

    numbers: Mapping[str, float]
    setting: float | Gradient | Sequence[Rule]


# a number, a gradient over the layers, or rules, of which the first that matches applies
Setting: TypeAlias = float | Gradient | Sequence[Rule] | Resolved


class Depth:
    """The depth of each tensor in its model, in [0, 1], at which gradients are read.

    Layer i of a stack of n layers (`taskvec.vectors.layers`) has depth i / (n − 1), or 1 if n is 1. Tensors outside of
    layers, such as embeddings, final norms and heads, have depth 0.
    Source: mergekit's planner, which sets t = 0 for all tensors outside of layers.

    Attributes:
        layers: Stack -> number of its layers.
    """

    def __init__(self, names: Iterable[str], layers: Mapping[str, int] | None = None) -> None:
        """Count the layers.

        Args:
            names: The names of tensors, from which layers are counted.
            layers: Stack -> number of its layers, used if it is larger than the count.
        """
        self.layers = most([counted(names), layers or {}])

    def __call__(self, name: str) -> float:
        place = stack_and_layer(name)
        if place is None:
            return 0.0
        stack, layer = place
        last = self.layers.get(stack, 0) - 1
        return layer / last if last > 0 else 1.0


def resolve(setting: Setting, name: str, depth: float) -> float | None:
    """The number that a setting gives to one tensor.

    Args:
        setting: A number, a gradient or rules. The first rule that matches applies.
        name: The name of the tensor.
        depth: The depth of the tensor, in [0, 1]. A gradient of m numbers is interpolated linearly at depth · (m − 1).

    Returns:
        The number, or None if no rule matches.
    """
    if isinstance(setting, Resolved):
        return setting.numbers.get(name)
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
    """Whether a setting may differ between layers."""
    if isinstance(setting, Resolved):
        return False
    if isinstance(setting, Rule):
        return has_gradient(setting.value)
    if not isinstance(setting, Sequence):
        return False
    if any(isinstance(each, Rule) for each in setting):
        return any(map(has_gradient, setting))
    return any(each != setting[0] for each in setting)


def numbers_of(setting: object, what: str = "setting") -> list[float]:
    """All numbers in a setting.

    Args:
        setting: A number, a gradient or rules.
        what: The name of the setting, for errors.

    Raises:
        UsageError: It is none of these, or it contains a number that is not finite.
    """
    if isinstance(setting, Resolved):
        return [number_of(each, what) for each in setting.numbers.values()]
    if isinstance(setting, Rule):
        if not isinstance(setting.filter, str | None):
            raise UsageError(f"{what}: the filter of a rule must be text, found {shown(setting.filter)}")
        return numbers_of(setting.value, what)
    if isinstance(setting, Sequence) and not isinstance(setting, str):
        kinds = {isinstance(each, Rule) for each in setting}
        if len(kinds) != 1 or any(isinstance(each, Sequence) for each in setting):
            raise UsageError(
                f"{what}: a setting must be a number, a list of numbers or a list of rules, found {shown(setting)}"
            )
        return [number for each in setting for number in numbers_of(each, what)]
    return [number_of(setting, what)]


def number_of(value: object, what: str) -> float:
    """Convert a finite number to float.

    Args:
        value: A number of Python or numpy, a fraction or a decimal. Booleans are refused.
        what: The name of the value, for errors.

    Raises:
        UsageError: The value is not a number, not finite, or too large for a float.
    """
    if not isinstance(value, (bool, np.bool_)):
        with suppress(UsageError):
            number = real(what, value)
            if math.isfinite(number):
                return number
    raise UsageError(f"{what}: expected a finite number, found {shown(value)}")


def described(setting: object) -> Any:
    """Convert a setting to JSON values."""
    if isinstance(setting, Resolved):
        return described(setting.setting)
    if isinstance(setting, Rule):
        return {"filter": setting.filter, "value": described(setting.value)}
    if isinstance(setting, Sequence):
        return [described(each) for each in setting]
    # numbers of numpy cannot be written as JSON; numbers of Python are unchanged
    return setting if isinstance(setting, int) or type(setting) is float else number_of(setting, "setting")
