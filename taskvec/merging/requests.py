"""What `merge` was asked for, checked and completed before anything is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..arguments import shown
from ..errors import UsageError
from ..vectors.vector import TaskVector
from .registry import Method
from .settings import Depth, Rule, Setting, numbers_of, resolve


def options_for(method: Method, options: Mapping[str, Any], density: object) -> dict[str, Any]:
    """Every option of a method as it is going to be.

    Raises:
        UsageError: The method does not have an option, or an option does not have that value.
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
    """One weight a vector, 1 each where none are given.

    Raises:
        UsageError: There are more or fewer, or one is no setting.
    """
    return [1.0] * len(vectors) if weights is None else _one_each("weight", "weights", weights, vectors)


def densities_for(
    method: Method, density: float | Sequence[Setting] | None, vectors: Sequence[TaskVector]
) -> Sequence[Setting]:
    """One density a vector, that of the method where none is given, 1 each where the method prunes nothing.

    Raises:
        UsageError: The method needs one, there are more or fewer, or one is no setting between 0 and 1.
    """
    if method.prune is None:
        return [1.0] * len(vectors)
    if density is None:
        density = method.density
    if density is None:
        raise UsageError(f"{method.name} needs a density")
    # a list of rules is one setting, which holds for all vectors
    for_all = not isinstance(density, Sequence) or any(isinstance(each, Rule) for each in density)
    given: Sequence[Setting] = [density] * len(vectors) if for_all else density  # type: ignore[list-item, assignment]
    for vector, setting in zip(vectors, _one_each("density", "densities", given, vectors), strict=True):
        for number in numbers_of(setting, f"density of {vector.name}"):
            if not 0 <= number <= 1:
                raise UsageError(
                    f"density of {vector.name}: a density is a share of the weights, between 0 and 1, found {number:g}"
                )
    return given


def _one_each(what: str, several: str, settings: Sequence[Setting], vectors: Sequence[TaskVector]) -> Sequence[Setting]:
    if len(settings) != len(vectors):
        raise UsageError(f"{len(settings)} {several} for {len(vectors)} vectors")
    for vector, setting in zip(vectors, settings, strict=True):
        if isinstance(setting, Rule):
            raise UsageError(f"{what} of {vector.name}: the rules of a vector are a list, found {shown(setting)}")
        numbers_of(setting, f"{what} of {vector.name}")
    return settings


def by_vector(
    what: str, settings: Sequence[Setting], vectors: Sequence[TaskVector], names: Iterable[str], depth: Depth
) -> list[dict[str, float]]:
    """The numbers that the settings of several vectors give to each tensor; the errors of `by_tensor`."""
    names = list(names)
    return [
        by_tensor(f"{what} of {vector.name}", setting, names, depth)
        for vector, setting in zip(vectors, settings, strict=True)
    ]


def by_tensor(what: str, setting: Setting, names: Iterable[str], depth: Depth) -> dict[str, float]:
    """The number that a setting gives to each tensor, by name.

    what: the name of the setting, for errors.

    Raises:
        UsageError: No rule fits a tensor.
    """
    numbers = {}
    for name in names:
        number = resolve(setting, name, depth(name))
        if number is None:
            raise UsageError(f"{what}: no rule fits tensor {name!r}: end the rules with one for all tensors")
        numbers[name] = number
    return numbers
