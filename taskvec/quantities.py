"""Numbers that a caller gives, of whatever kind: of Python, numpy or torch, fractions and decimals."""

from __future__ import annotations

import math
import operator
from typing import SupportsFloat

import numpy as np

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


def said(value: object, most: int = 60) -> str:
    """A value in an error: its representation, no longer than `most` characters."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of about {round(value.bit_length() * math.log10(2))} digits"
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
