"""Options of merge methods: names, types, defaults and bounds, declared by the signatures of their functions.

A keyword-only argument of a method's function is an option. Its annotation gives the values that it accepts: `bool`,
`int`, `float`, `str`, a `Literal` of the choices, or one of these in `Annotated[..., Bounds(...)]`. An option with
`| None`, or with the default None, also accepts None. An option without an annotation, or with another one, accepts any
value.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from ...arguments import real, shown, whole
from ...errors import UsageError

_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True)
class Bounds:
    """The range of numbers that an option accepts.

    Attributes:
        least: The smallest number.
        most: The largest number.
        below: Whether `most` itself is excluded.
    """

    least: float = -math.inf
    most: float = math.inf
    below: bool = False

    def __contains__(self, number: float) -> bool:
        return self.least <= number and (number < self.most if self.below else number <= self.most)

    def __str__(self) -> str:
        least = [] if math.isinf(self.least) else [f"at least {self.least}"]
        most = [] if math.isinf(self.most) else [f"{'below' if self.below else 'at most'} {self.most}"]
        return " and ".join([*least, *most])


@dataclass(frozen=True)
class Option:
    """An option of a merge method.

    Attributes:
        name: The name of the keyword argument.
        default: The default value.
        kind: bool, int, float or str. None accepts any value.
        choices: The accepted values, without None. Empty if they are not listed.
        bounds: The range of numbers that the option accepts.
        optional: Whether the option also accepts None.
    """

    name: str
    default: Any
    kind: type | None = None
    choices: tuple[object, ...] = ()
    bounds: Bounds = Bounds()
    optional: bool = False

    @property
    def label(self) -> str:
        """The name in backticks, for errors. The command line turns it into a flag."""
        return f"`{self.name}`"

    def read(self, value: object) -> Any:
        """Check a value.

        Args:
            value: A value of any type. Numbers of numpy are accepted.

        Returns:
            The value, with numbers converted to Python's types.

        Raises:
            UsageError: The option does not accept the value.
        """
        if value is None and self.optional:
            return None
        if self.choices:
            # compare types too: 1 == True
            if any(type(choice) is type(value) and choice == value for choice in self.choices):
                return value
            expected = ", ".join(str(choice) for choice in self.choices)
            raise UsageError(f"{self.label} is one of {expected}, found {shown(value)}")
        if self.kind is bool:
            if isinstance(value, (bool, np.bool_)):
                return bool(value)
            raise self._refusal("True or False", value)
        if self.kind in (int, float):
            number = self._number(value)
            if number in self.bounds and (self.kind is int or math.isfinite(number)):
                return number
            raise self._refusal(str(self.bounds) or "finite", value)
        if self.kind is str and not isinstance(value, str):
            raise self._refusal("a string", value)
        return value

    def _number(self, value: object) -> float:
        if not isinstance(value, (bool, np.bool_)):
            with suppress(UsageError):
                return whole(self.label, value) if self.kind is int else real(self.label, value)
        raise self._refusal("a whole number" if self.kind is int else "a number", value)

    def _refusal(self, expected: str, value: object) -> UsageError:
        or_none = ", or None" if self.optional else ""
        return UsageError(f"{self.label} must be {expected}{or_none}, found {shown(value)}")

    def parse(self, text: str) -> Any:
        """Parse a value from text, as given on the command line.

        Args:
            text: The text. "none" is None if the option accepts None and has no choice of this name.

        Returns:
            The value.

        Raises:
            UsageError: The option does not accept the value.
        """
        named = {str(choice): choice for choice in self.choices}
        if self.optional and text.lower() == "none" and text not in named:
            return None
        if self.choices:
            return self.read(named.get(text, text))
        if self.kind is bool:
            return self.read(_BOOLEANS.get(text.lower(), text))
        if self.kind in (int, float):
            with suppress(ValueError):
                return self.read(self.kind(text))
        return self.read(text)


def options_of(function: Callable[..., object]) -> dict[str, Option]:
    """The options that a function declares.

    Args:
        function: A function of a merge method.

    Returns:
        Name -> option.

    Raises:
        UsageError: A keyword-only argument has no default.
    """
    hints = _hints(function)
    found = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            if parameter.default is inspect.Parameter.empty:
                raise UsageError(f"the option `{parameter.name}` needs a default")
            found[parameter.name] = _option(parameter.name, parameter.default, hints.get(parameter.name))
    return found


def _hints(function: Callable[..., object]) -> dict[str, Any]:
    """The evaluated annotations of a function."""
    inner = inspect.unwrap(function)
    hints: dict[str, Any] = {}
    for name, annotation in getattr(inner, "__annotations__", {}).items():
        # one by one: an annotation that is imported for type checkers only must not hide the others
        alone = SimpleNamespace(__annotations__={name: annotation})
        with suppress(NameError):
            hints |= get_type_hints(alone, getattr(inner, "__globals__", None), include_extras=True)
    return hints


def _option(name: str, default: Any, hint: Any) -> Option:
    bounds, optional = Bounds(), default is None
    while get_origin(hint) in (Annotated, Union, UnionType):
        first, *more = get_args(hint)
        if get_origin(hint) is Annotated:
            bounds = next((each for each in more if isinstance(each, Bounds)), bounds)
            hint = first
        else:
            kinds = [each for each in (first, *more) if each is not NoneType]
            optional = optional or NoneType in (first, *more)
            hint = kinds[0] if len(kinds) == 1 else None
    if get_origin(hint) is Literal:
        choices = tuple(choice for choice in get_args(hint) if choice is not None)
        return Option(name, default, None, choices, optional=optional or None in get_args(hint))
    return Option(name, default, hint if hint in (bool, int, float, str) else None, (), bounds, optional)
