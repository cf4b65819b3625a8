"""Parameters of a merge file, parsed as mergekit parses them and checked for the place where they are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from taskvec_formats.text import printable

from ..arguments import shown
from ..errors import UsageError
from .registry import AUTO, METHODS, method_of
from .settings import Rule, Setting, number_of, numbers_of

SETTINGS = ("weight", "density", "lambda")  # may differ between tensors, for every method
# the spellings that pydantic accepts, with which mergekit parses merge files
_TRUE = (True, 1, "1", "on", "t", "true", "y", "yes")
_FALSE = (False, 0, "0", "off", "f", "false", "n", "no")


def names_for_all() -> list[str]:
    """The parameters that may be given for all models: those of every method, and int8_mask, which has no effect."""
    return list(dict.fromkeys([*SETTINGS, "int8_mask", *(name for each in METHODS.values() for name in each.options)]))


def names_for_a_model() -> list[str]:
    """The parameters that may be given for one model: weight, density and options of type float."""
    numbers = [name for each in METHODS.values() for name, option in each.options.items() if option.kind is float]
    return list(dict.fromkeys(["weight", "density", *numbers]))


def parameters_of(
    document: Any, named: str, method: str, known: Sequence[str], owner: str, notes: list[str]
) -> dict[str, Any]:
    """Read the parameters of all models, or of one, and keep those that have an effect.

    Args:
        document: The value in the file. None if it is absent.
        named: The name of the method in the file.
        method: The name of the same method in taskvec.
        known: The names that are allowed in this place.
        owner: The prefix of errors and notes: "model NAME: " or "".
        notes: A sentence is appended for each parameter that has no effect.

    Returns:
        Name -> value: a Setting for SETTINGS and for options of type float, a bool for rescale and for options of type
        bool. Other values are unchanged, and so is None if the option accepts it.

    Raises:
        UsageError: The parameter does not accept the value, or a parameter of all models is given for one model.
    """
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise UsageError(f"{owner}parameters must be names and values, found {shown(document)}")
    found = {}
    for name, value in document.items():
        if name not in known and name in names_for_all():
            raise UsageError(f"{owner}unknown parameter {name!r}: it belongs under the 'parameters' of the document")
        if name not in known or not _has_effect(name, method):
            notes.append(f"{owner}{printable(name, 80)} has no effect on {named}")
            continue
        found[name] = _reader(name, method)(value, f"{owner}{name}")
    return found


def _reader(name: str, method: str) -> Callable[[Any, str], Any]:
    option = None if method == AUTO else method_of(method).options.get(name)
    kind = None if option is None else option.kind
    if name in SETTINGS or kind is float:
        read: Callable[[Any, str], Any] = _setting
    else:
        # rescale is a choice in taskvec and a boolean in mergekit
        read = _boolean if name in ("normalize", "rescale") or kind is bool else _unchanged
    accepts_none = option is not None and option.optional and kind is not None
    return (lambda value, what: None if value is None else read(value, what)) if accepts_none else read


def _has_effect(name: str, method: str) -> bool:
    """Whether a parameter has an effect on a method.

    For `auto` every parameter counts as having one, so that `merge` refuses options instead of ignoring them.
    """
    if name == "int8_mask":
        return False
    if method == "average":
        return name in ("weight", "normalize")
    if name in ("weight", "lambda") or method == AUTO:
        return True
    known = method_of(method)
    return name in known.options or (name == "density" and known.prune is not None)


def _setting(value: Any, what: str) -> Setting:
    """Parse a number, a list of numbers, {value, filter} or a list of those."""
    setting: Setting
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        setting = [_rule(each, what) for each in value]
    elif isinstance(value, list):
        setting = [_number(each, what) for each in value]
    else:
        setting = _number(value, what)
    numbers_of(setting, what)
    return setting


def _rule(value: Any, what: str) -> Rule:
    if not isinstance(value, dict) or "value" not in value or set(value) - {"value", "filter"}:
        raise UsageError(f"{what}: a rule must be {{filter: NAME, value: NUMBER}}, found {shown(value)}")
    name = value.get("filter")
    if name is not None and not isinstance(name, str):
        raise UsageError(f"{what}: the filter of a rule must be text, found {shown(name)}")
    inner = value["value"]
    numbers = [_number(each, what) for each in inner] if isinstance(inner, list) else _number(inner, what)
    return Rule(numbers, name)


def _number(value: Any, what: str) -> float:
    # YAML 1.1 parses 1e-3 as a string
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"{what}: expected a number, found {shown(value)}")
    return number_of(value, what)


def _boolean(value: Any, what: str) -> bool:
    value = value.lower() if isinstance(value, str) else value
    if isinstance(value, (bool, int, float, str)):
        if value in _TRUE:
            return True
        if value in _FALSE:
            return False
    raise UsageError(f"{what}: expected true or false for all tensors, found {shown(value)}")


def _unchanged(value: Any, what: str) -> Any:
    return value
