"""Checks and defaults of the arguments of `merge`, applied before any tensor is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsFloat

from taskvec_formats.text import printable

from ..arguments import shown
from ..errors import UsageError
from ..vectors.vector import TaskVector
from .registry import AUTO, Method
from .settings import Depth, Rule, Setting, numbers_of, resolve

_LAMBDA = ("lambda", "lambda_")  # lambda is a keyword of Python, so merge calls it lam


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
            raise UsageError(f"{method.name} has no option `{printable(name, 80)}`; {_instead(name, method)}")
    checked = {name: known[name].read(value) for name, value in options.items()}
    defaults = {name: option.default for name, option in known.items()}
    dialect = options.get("dialect", "reference")
    return {**defaults, **method.dialects.get(dialect, {}), **checked}


def _instead(name: str, method: Method) -> str:
    """What to give instead of an option that a method does not have."""
    names = sorted([*method.options, *["density"] * (method.prune is not None)])
    spelled = name.replace("-", "_")
    if name in _LAMBDA:
        return "λ is `lam`"
    if spelled in names:
        return f"it is spelled `{spelled}`"
    return f"it has {', '.join(f'`{each}`' for each in names)}" if names else "it has none"


def refuse_options(options: Mapping[str, Any], density: object) -> None:
    """Refuse options for the method `auto`.

    Args:
        options: Name -> value, as given.
        density: The density as given, or None.

    Raises:
        UsageError: There is an option or a density.
    """
    for name in _LAMBDA:
        if name in options:
            raise UsageError(f"{AUTO} has no option `{name}`; λ is `lam`")
    if density is not None or options:
        raise UsageError(f"{AUTO} chooses the method and takes no options: name a method to set its options")


def check_count(method: Method, count: int) -> None:
    """Check the number of vectors of a merge.

    Args:
        method: The merge method.
        count: The number of vectors.

    Raises:
        UsageError: The method merges fewer or more vectors.
    """
    least, most = method.count
    if count < least or (most is not None and count > most):
        wanted = f"{least} vector{'s' * (least != 1)}" if least == most else f"at least {least} vectors"
        raise UsageError(f"{method.name} merges {wanted}, found {count}")


def check_weights(method: Method, weights: object) -> None:
    """Refuse weights for a method that does not use them.

    Args:
        method: The merge method.
        weights: The weights, as given, or None.

    Raises:
        UsageError: The method has no weights, and some are given.
    """
    if weights is not None and not method.weighs:
        raise UsageError(f"{method.name} does not use `weights`: leave them out")


def check_lambda(lam: object) -> None:
    """Check λ.

    Args:
        lam: λ, as given.

    Raises:
        UsageError: It is not a number, a list of numbers or a list of rules.
    """
    if isinstance(lam, Rule):
        raise UsageError(f"`lam`: the rules of λ must be a list, found {shown(lam)}")
    numbers_of(lam, "lambda")


def listed(settings: Any) -> Any:
    """Convert an array of one dimension, of numpy or torch, to a list. Other values are returned unchanged."""
    return settings.tolist() if getattr(settings, "ndim", None) == 1 and hasattr(settings, "tolist") else settings


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def weights_for(weights: Sequence[Setting] | None, vectors: Sequence[TaskVector]) -> Sequence[Setting]:
    """The weights of the vectors.

    Args:
        weights: One setting per vector, in a list, a tuple or an array, or None for 1 each.
        vectors: The vectors to merge.

    Returns:
        One weight per vector.

    Raises:
        UsageError: The weights are not a list, their number is not the number of vectors, or a weight is not a valid
            setting.
    """
    if weights is None:
        return [1.0] * len(vectors)
    weights = listed(weights)
    if not _is_list(weights):
        raise UsageError(f"`weights` must be a list with one setting per vector, found {shown(weights)}")
    return _one_each("weight", "weights", weights, vectors)


def densities_for(
    method: Method, density: float | Sequence[Setting] | None, vectors: Sequence[TaskVector]
) -> Sequence[Setting]:
    """The densities of the vectors.

    Args:
        method: The merge method.
        density: A setting for all vectors, or one per vector in a list or a tuple. None takes the default of the
            method.
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
    if not _is_list(density) and not isinstance(density, (SupportsFloat, Rule)):
        raise UsageError(f"`density` must be a number, or a list with one setting per vector, found {shown(density)}")
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
