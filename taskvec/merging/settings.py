"""Numbers that may differ from tensor to tensor: by layer, by name. The rules are mergekit's.

https://github.com/arcee-ai/mergekit/blob/main/README.md#parameter-specification
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..errors import UsageError
from ..names import layer_and_module

Gradient: TypeAlias = Sequence[float]


@dataclass(frozen=True)
class Rule:
    """A value for the tensors whose name contains `filter`; None or "*" is all of them."""

    value: float | Gradient
    filter: str | None = None


# one number; a gradient over the layers; or rules, of which the first that fits counts
Setting: TypeAlias = float | Gradient | Sequence[Rule]


class Depth:
    """How deep each tensor lies in a model, in [0, 1]: what gradients are read at.

    Layer i of n lies at i / (n − 1), or at 1 where there is only one; tensors before the blocks lie at 0, those after
    them at 1.
    """

    def __init__(self, names: Iterable[str]) -> None:
        layers = {layer for name in names if (layer := layer_and_module(name)[0]) is not None}
        self._last = max(layers, default=0)

    def __call__(self, name: str) -> float:
        layer, module = layer_and_module(name)
        if layer is None:
            return 0.0 if any(word in module for word in ("embed", "wte", "wpe")) else 1.0
        return layer / self._last if self._last else 1.0


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


def numbers_of(setting: object) -> list[float]:
    """Every number in a setting. Raises UsageError where it is none, or holds something else."""
    if isinstance(setting, Rule):
        return numbers_of(setting.value)
    if isinstance(setting, Sequence) and not isinstance(setting, str):
        kinds = {isinstance(each, Rule) for each in setting}
        if len(kinds) != 1 or any(isinstance(each, Sequence) for each in setting):
            raise UsageError(f"a setting is a number, a list of numbers or a list of rules, found {setting!r}")
        return [number for each in setting for number in numbers_of(each)]
    if isinstance(setting, bool) or not isinstance(setting, (int, float)) or not math.isfinite(setting):
        raise UsageError(f"expected a finite number, found {setting}")
    return [float(setting)]


def described(setting: object) -> Any:
    """A setting as JSON."""
    if isinstance(setting, Rule):
        return {"filter": setting.filter, "value": described(setting.value)}
    return [described(each) for each in setting] if isinstance(setting, Sequence) else setting
