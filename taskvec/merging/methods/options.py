"""Options of merge methods: names, types, defaults and bounds, declared by the signatures of their functions.

A keyword-only argument of a method's function is an option. Its annotation gives the values that it accepts: `bool`,
`int`, `float`, `str`, a `Literal` of the choices, or one of these in `Annotated[..., Bounds(...)]`. `| None` also
accepts None. An option without an annotation accepts any value.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType, UnionType
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
        choices: The accepted values. Empty if they are not listed.
        bounds: The range of numbers that the option accepts.
    """

    name: str
    default: Any
    kind: type | None = None
    choices: tuple[object, ...] = ()
    bounds: Bounds = Bounds()

    @property
    def label(self) -> str:
        """The name with hyphens, as on the command line."""
        return self.name.replace("_", "-")

    def read(self, value: object) -> Any:
        """Check a value.

        Args:
            value: A value of any type. Numbers of numpy are accepted.

        Returns:
            The value, with numbers converted to Python's types.

        Raises:
            UsageError: The option does not accept the value.
        """
        if self.choices:
            # compare types too: 1 == True
            if any(type(choice) is type(value) and choice == value for choice in self.choices):
                return value
            expected = ", ".join(str(choice) for choice in self.choices if choice is not None)
            raise UsageError(f"{self.label} is one of {expected}, found {shown(value)}")
        if self.kind is bool:
            if isinstance(value, (bool, np.bool_)):
                return bool(value)
            raise UsageError(f"{self.label} must be True or False, found {shown(value)}")
        if self.kind in (int, float):
            if isinstance(value, (bool, np.bool_)):
                raise UsageError(f"{self.label} must be a number, found {shown(value)}")
            number = whole(self.label, value) if self.kind is int else real(self.label, value)
            if number in self.bounds and (self.kind is int or math.isfinite(number)):
                return number
            raise UsageError(f"{self.label} must be {str(self.bounds) or 'finite'}, found {shown(value)}")
        if self.kind is str and not isinstance(value, str):
            raise UsageError(f"{self.label} must be a string, found {shown(value)}")
        return value

    def parse(self, text: str) -> Any:
        """Parse a value from text, as given on the command line.

        Args:
            text: The text.

        Returns:
            The value.

        Raises:
            UsageError: The option does not accept the value.
        """
        if self.choices:
            named = {str(choice): choice for choice in self.choices if choice is not None}
            return self.read(named.get(text, text))
        if self.kind is bool:
            return self.read(_BOOLEANS.get(text.lower(), text))
        if self.kind in (int, float):
            try:
                return self.read(self.kind(text))
            except ValueError:
                wanted = "a whole number" if self.kind is int else "a number"
                raise UsageError(f"{self.label} must be {wanted}, found {shown(text)}") from None
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
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError:  # an annotation that is imported for type checkers only
        hints = {}
    found = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            if parameter.default is inspect.Parameter.empty:
                raise UsageError(f"option {parameter.name!r} of a merge method needs a default")
            found[parameter.name] = _option(parameter.name, parameter.default, hints.get(parameter.name))
    return found


def _option(name: str, default: Any, hint: Any) -> Option:
    bounds = Bounds()
    if get_origin(hint) is Annotated:
        hint, *more = get_args(hint)
        bounds = next((each for each in more if isinstance(each, Bounds)), bounds)
    optional = False
    if get_origin(hint) in (Union, UnionType):
        kinds = [each for each in get_args(hint) if each is not NoneType]
        optional = len(kinds) < len(get_args(hint))
        hint = kinds[0] if len(kinds) == 1 else None
    if get_origin(hint) is Literal:
        return Option(name, default, None, (*get_args(hint), *[None] * optional))
    return Option(name, default, hint if hint in (bool, int, float, str) and not optional else None, (), bounds)
