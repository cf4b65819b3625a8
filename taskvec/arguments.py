"""What a caller gives: values of the types that are meant, and numbers of whatever kind as Python's own.

Numbers may be those of numpy and torch, fractions and decimals.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Sequence
from typing import SupportsFloat

import numpy as np

from taskvec_formats.text import printable

from .errors import UsageError


def real(what: str, value: object) -> float:
    """The value as a float; what is too large for one is infinite, what has no value is NaN.

    Raises UsageError for anything but a real number. what: how to call it there.
    """
    if isinstance(value, SupportsFloat) and not isinstance(value, np.complexfloating):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf  # type: ignore[operator]  # only numbers overflow
        except (TypeError, ValueError, RuntimeError):  # several values, none, or a signalling NaN
            if str(value) == "sNaN":
                return math.nan
    raise UsageError(f"{what} must be a number, found {said(value)}")


def whole(what: str, value: object) -> int:
    """The value as an int. Raises UsageError for anything but a whole number, 3.0 included."""
    try:
        return int(operator.index(value))  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(f"{what} must be a whole number, found {said(value)}") from None


def one_of(what: str, value: object, choices: Collection[str]) -> None:
    """Raise UsageError for anything but one of these strings."""
    if not isinstance(value, str) or value not in choices:
        raise UsageError(f"{what} is one of {', '.join(choices)}, found {said(value)}")


def instance(what: str, value: object, kind: type) -> None:
    """Raise UsageError for anything but an instance of a type."""
    if not isinstance(value, kind):
        raise UsageError(f"{what} must be a {kind.__name__}, found {said(value)}")


def instances(what: str, values: object, kind: type) -> None:
    """Raise UsageError for anything but a sequence of instances of a type."""
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise UsageError(f"{what} must be a list of {kind.__name__}s, found {said(values)}")
    for number, value in enumerate(values, 1):
        instance(f"{what}, number {number},", value, kind)


def said(value: object, most: int = 60) -> str:
    """A value in an error: its representation, no longer than `most` characters."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of about {round(value.bit_length() * math.log10(2))} digits"
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def shown(value: object) -> str:
    """A value for a message: its repr as a part of one line."""
    try:
        return printable(said(value, 80))
    except (ValueError, RecursionError):  # an integer of thousands of digits; nesting without end
        return f"a {type(value).__name__}"
