"""Checks and conversions of arguments that callers pass.

Numbers may come from numpy or torch, or be fractions or decimals; they are converted to Python's own types.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import SupportsFloat

import numpy as np

from taskvec_formats.text import printable

from .errors import UsageError


def real(what: str, value: object) -> float:
    """Convert a real number to a float.

    Args:
        what: The name of the argument, for the error message.
        value: The value to convert.

    Returns:
        The float. A number too large for a float becomes infinite; a signalling NaN becomes NaN.

    Raises:
        UsageError: The value is not a real number.
    """
    if isinstance(value, SupportsFloat) and not isinstance(value, np.complexfloating):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf  # type: ignore[operator]  # only numbers overflow
        except (TypeError, ValueError, RuntimeError):  # an array of several or no elements, or a signalling NaN
            if str(value) == "sNaN":
                return math.nan
    raise UsageError(f"{what} must be a number, found {said(value)}")


def whole(what: str, value: object) -> int:
    """Convert a whole number to an int.

    Args:
        what: The name of the argument, for the error message.
        value: The value to convert. Floats are refused, including 3.0.

    Raises:
        UsageError: The value is not a whole number.
    """
    if isinstance(value, (bool, np.bool_)):
        raise UsageError(f"{what} must be a whole number, found {said(value)}")
    try:
        return int(operator.index(value))  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(f"{what} must be a whole number, found {said(value)}") from None


def truth(what: str, value: object) -> bool:
    """Convert a Boolean to a bool. Other values, such as the string "false", are not Booleans.

    Args:
        what: The name of the argument, for the error message.
        value: The value to convert.

    Raises:
        UsageError: The value is not a Boolean.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise UsageError(f"{what} must be True or False, found {said(value)}")
    return bool(value)


def path_of(what: str, value: object) -> Path:
    """Convert a string or another path to a Path.

    Args:
        what: The name of the argument, for the error message.
        value: The value to convert.

    Raises:
        UsageError: The value is not a path, is empty, or cannot be a path.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise UsageError(f"{what} must be a path, found {shown(value)}")
    try:
        name = os.fsencode(value)
    except ValueError as error:  # includes UnicodeEncodeError
        raise UsageError(f"{what} cannot be a path ({error}), found {shown(value)}") from None
    if not name:  # the Path of an empty text is the current folder
        raise UsageError(f"{what} must be a path, found {shown(value)}")
    if b"\0" in name:
        raise UsageError(f"{what} cannot be a path: it contains a zero byte, found {shown(value)}")
    return Path(os.fsdecode(value))


def one_of(what: str, value: object, choices: Collection[str]) -> None:
    """Check that a value is one of several strings.

    Args:
        what: The name of the argument, for the error message.
        value: The value to check.
        choices: The allowed strings.

    Raises:
        UsageError: The value is not one of `choices`.
    """
    if not isinstance(value, str) or value not in choices:
        raise UsageError(f"{what} is one of {', '.join(choices)}, found {said(value)}")


def instance(what: str, value: object, kind: type) -> None:
    """Check that a value is an instance of a type.

    Args:
        what: The name of the argument, for the error message.
        value: The value to check.
        kind: The expected type.

    Raises:
        UsageError: The value is not an instance of `kind`.
    """
    if not isinstance(value, kind):
        raise UsageError(f"{what} must be a {kind.__name__}, found {said(value)}")


def instances(what: str, values: object, kind: type) -> None:
    """Check that a value is a sequence of instances of a type.

    Args:
        what: The name of the argument, for the error message.
        values: The value to check.
        kind: The expected type of the elements.

    Raises:
        UsageError: The value is not a sequence, or an element is not an instance of `kind`.
    """
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        plural = "strings" if kind is str else f"{kind.__name__}s"
        raise UsageError(f"{what} must be a list of {plural}, found {said(values)}")
    for number, value in enumerate(values, 1):
        instance(f"{what}, number {number},", value, kind)


def said(value: object, most: int = 60) -> str:
    """Return the repr of a value for an error message.

    Args:
        value: The value to show.
        most: The largest number of characters; a longer repr is cut.
    """
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of about {round(value.bit_length() * math.log10(2))} digits"
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def shown(value: object) -> str:
    """Return the repr of a value as a single printable line, for an error message."""
    try:
        return printable(said(value, 80))
    except (ValueError, RecursionError):  # an integer of thousands of digits, or very deep nesting
        return f"a {type(value).__name__}"
