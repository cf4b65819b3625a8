"""What `merge` was asked for, checked and completed before anything is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from ..arguments import shown
from ..errors import UsageError
from ..vectors.vector import TaskVector
from .methods.dialects import DIALECTS
from .methods.disjoint import POLICIES
from .methods.pruning import RESCALES
from .methods.ties import ELECTIONS
from .registry import Method
from .settings import Depth, Rule, Setting, numbers_of, resolve

_CHOICES: dict[str, Iterable[object]] = {
    "dialect": DIALECTS,
    "elect": ELECTIONS,
    "on_overlap": POLICIES,
    "rescale": (*RESCALES, None),
    "normalize": (True, False),
}
_SEEDS = -(2**63), 2**64 - 1


def options_for(method: Method, options: Mapping[str, Any], density: object) -> dict[str, Any]:
    """Every option of a method as it is going to be.

    Raises:
        UsageError: The method does not have an option, or an option does not have that value.
    """
    known = method.options
    if density is not None and method.prune is None:
        raise UsageError(f"{method.name} has no density: it prunes nothing")
    for name, value in options.items():
        if name not in known or name == "density":
            has = f"it has {', '.join(sorted(known))}" if known else "it has none"
            raise UsageError(f"{method.name} has no option {name.replace('_', '-')!r}; {has}")
        if name in _CHOICES and value not in _comparable(name, value):
            choices = ", ".join(str(choice) for choice in _CHOICES[name] if choice is not None)
            raise UsageError(f"{name.replace('_', '-')} is one of {choices}, found {shown(value)}")
    checked = dict(options)
    if "gamma" in options:
        (checked["gamma"],) = numbers_of([options["gamma"]], "gamma")
        if not 0 <= checked["gamma"] < 1:
            raise UsageError(f"gamma is a share of the weights, at least 0 and below 1, found {checked['gamma']:g}")
    if "seed" in options:
        checked["seed"] = _seed(options["seed"])
    defaults = {name: default for name, default in known.items() if name != "density"}
    dialect = options.get("dialect", "reference")
    return {**defaults, **method.dialects.get(dialect, {}), **checked}


def _comparable(name: str, value: object) -> list[object]:
    """The choices that a value can be compared with: `==` of arrays is an array, and 1 equals True."""
    return [choice for choice in _CHOICES[name] if type(choice) is type(value)]


def _seed(seed: object) -> int:
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise UsageError(f"a seed is a whole number, found {shown(seed)}")
    if not _SEEDS[0] <= int(seed) <= _SEEDS[1]:
        raise UsageError("a seed is a whole number between -2^63 and 2^64 - 1")
    return int(seed)


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
