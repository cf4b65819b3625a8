"""Checks and defaults of the arguments of `merge`, applied before any tensor is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..arguments import shown
from ..errors import UsageError
from ..vectors.vector import TaskVector
from .registry import Method
from .settings import Depth, Rule, Setting, numbers_of, resolve


def options_for(method: Method, options: Mapping[str, Any], density: object) -> dict[str, Any]:
    """Check the options of a method and fill in its defaults.

    Args:
        method: The merge method.
        options: Name -> value, as given.
        density: The density as given, or None.

    Returns:
        Every option of the method, by name.

    Raises:
        UsageError: The method has no such option or no density, or an option does not accept the value.
    """
    known = method.options
    if density is not None and method.prune is None:
        raise UsageError(f"{method.name} has no density: it prunes nothing")
    for name in options:
        if name not in known:
            names = sorted([*known, *["density"] * (method.prune is not None)])
            has = f"it has {', '.join(names)}" if names else "it has none"
            raise UsageError(f"{method.name} has no option {name.replace('_', '-')!r}; {has}")
    checked = {name: known[name].read(value) for name, value in options.items()}
    defaults = {name: option.default for name, option in known.items()}
    dialect = options.get("dialect", "reference")
    return {**defaults, **method.dialects.get(dialect, {}), **checked}


def weights_for(weights: Sequence[Setting] | None, vectors: Sequence[TaskVector]) -> Sequence[Setting]:
    """The weights of the vectors.

    Args:
        weights: One setting per vector, or None for 1 each.
        vectors: The vectors to merge.

    Returns:
        One weight per vector.

    Raises:
        UsageError: The number of weights is not the number of vectors, or a weight is not a valid setting.
    """
    return [1.0] * len(vectors) if weights is None else _one_each("weight", "weights", weights, vectors)


def densities_for(
    method: Method, density: float | Sequence[Setting] | None, vectors: Sequence[TaskVector]
) -> Sequence[Setting]:
    """The densities of the vectors.

    Args:
        method: The merge method.
        density: A setting for all vectors, or one per vector. None takes the default of the method.
        vectors: The vectors to merge.

    Returns:
        One density per vector: 1 each if the method does not prune.

    Raises:
        UsageError: The method needs a density, the number of densities is not the number of vectors, or a density is
            not a valid setting of numbers between 0 and 1.
    """
    if method.prune is None:
        return [1.0] * len(vectors)
    if density is None:
        density = method.density
    if density is None:
        raise UsageError(f"{method.name} needs a density")
    # a list of rules is one setting, which applies to all vectors
    for_all = not isinstance(density, Sequence) or any(isinstance(each, Rule) for each in density)
    given: Sequence[Setting] = [density] * len(vectors) if for_all else density  # type: ignore[list-item, assignment]
    for vector, setting in zip(vectors, _one_each("density", "densities", given, vectors), strict=True):
        for number in numbers_of(setting, f"density of {vector.name}"):
            if not 0 <= number <= 1:
                raise UsageError(
                    f"density of {vector.name}: expected a share of the weights between 0 and 1, found {number:g}"
                )
    return given


def _one_each(what: str, several: str, settings: Sequence[Setting], vectors: Sequence[TaskVector]) -> Sequence[Setting]:
    if len(settings) != len(vectors):
        raise UsageError(f"{len(settings)} {several} for {len(vectors)} vectors")
    for vector, setting in zip(vectors, settings, strict=True):
        if isinstance(setting, Rule):
            raise UsageError(f"{what} of {vector.name}: the rules of a vector must be a list, found {shown(setting)}")
        numbers_of(setting, f"{what} of {vector.name}")
    return settings


def by_vector(
    what: str, settings: Sequence[Setting], vectors: Sequence[TaskVector], names: Iterable[str], depth: Depth
) -> list[dict[str, float]]:
    """Resolve one setting per vector for each tensor.

    Args:
        what: The name of the setting, for errors.
        settings: One setting per vector.
        vectors: The vectors to merge.
        names: The names of the tensors.
        depth: The depth of each tensor.

    Returns:
        One mapping per vector: tensor name -> number.

    Raises:
        UsageError: No rule matches a tensor.
    """
    names = list(names)
    return [
        by_tensor(f"{what} of {vector.name}", setting, names, depth)
        for vector, setting in zip(vectors, settings, strict=True)
    ]


def by_tensor(what: str, setting: Setting, names: Iterable[str], depth: Depth) -> dict[str, float]:
    """Resolve a setting for each tensor.

    Args:
        what: The name of the setting, for errors.
        setting: A number, a gradient or rules.
        names: The names of the tensors.
        depth: The depth of each tensor.

    Returns:
        Tensor name -> number.

    Raises:
        UsageError: No rule matches a tensor.
    """
    numbers = {}
    for name in names:
        number = resolve(setting, name, depth(name))
        if number is None:
            raise UsageError(f"{what}: no rule matches tensor {name!r}: end the rules with one for all tensors")
        numbers[name] = number
    return numbers
