"""The parameters of a merge file: read as mergekit reads them, checked where they stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from taskvec_formats.text import printable

from ..arguments import shown
from ..errors import UsageError
from .registry import AUTO, METHODS, method_of
from .settings import Rule, Setting, number_of, numbers_of

SETTINGS = ("weight", "density", "lambda")  # may differ from tensor to tensor, whatever the method
# of pydantic, by which mergekit reads them
_TRUE = (True, 1, "1", "on", "t", "true", "y", "yes")
_FALSE = (False, 0, "0", "off", "f", "false", "n", "no")


def names_for_all() -> list[str]:
    """The parameters that may stand under the whole document: those of every method, and one without effect here."""
    return list(dict.fromkeys([*SETTINGS, "int8_mask", *(name for each in METHODS.values() for name in each.options)]))


def names_for_a_model() -> list[str]:
    """Those that may stand under a model: settings, and options that are numbers with a fraction."""
    numbers = [name for each in METHODS.values() for name, option in each.options.items() if option.kind is float]
    return list(dict.fromkeys(["weight", "density", *numbers]))


def parameters_of(
    document: Any, named: str, method: str, known: Sequence[str], owner: str, notes: list[str]
) -> dict[str, Any]:
    """The parameters of all models, or of one, that have an effect.

    Args:
        document: What stands in the file; None for nothing.
        named: The method as the file calls it.
        method: The same as it is called here.
        known: The names that may stand there.
        owner: What to put before errors and notes: "model NAME: ", or nothing.
        notes: Receives a sentence for each parameter that has no effect.

    Returns:
        Name -> a Setting for those of SETTINGS and for options that are numbers with a fraction; a truth value for
        rescale and for options that are true or false; others as they are.

    Raises:
        UsageError: A value is none that the parameter can have, or a parameter of all models stands at one.
    """
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise UsageError(f"{owner}parameters are names and values, found {shown(document)}")
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
        return _setting
    # a choice here, and a truth value in mergekit
    return _truth if name in ("normalize", "rescale") or kind is bool else _as_it_is


def _has_effect(name: str, method: str) -> bool:
    """Whether a parameter changes what a method does. It chooses the method `auto`, which then refuses them itself."""
    if name == "int8_mask":
        return False
    if method == "average":
        return name in ("weight", "normalize")
    if name in ("weight", "lambda") or method == AUTO:
        return True
    known = method_of(method)
    return name in known.options or (name == "density" and known.prune is not None)


def _setting(value: Any, what: str) -> Setting:
    """A number, a list of numbers, {value, filter} or a list of those."""
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
        raise UsageError(f"{what}: a rule is {{filter: NAME, value: NUMBER}}, found {shown(value)}")
    name = value.get("filter")
    if name is not None and not isinstance(name, str):
        raise UsageError(f"{what}: the filter of a rule is text, found {shown(name)}")
    inner = value["value"]
    numbers = [_number(each, what) for each in inner] if isinstance(inner, list) else _number(inner, what)
    return Rule(numbers, name)


def _number(value: Any, what: str) -> float:
    # YAML reads 1e-3 as text
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"{what}: expected a number, found {shown(value)}")
    return number_of(value, what)


def _truth(value: Any, what: str) -> bool:
    value = value.lower() if isinstance(value, str) else value
    if isinstance(value, (bool, int, float, str)):
        if value in _TRUE:
            return True
        if value in _FALSE:
            return False
    raise UsageError(f"{what}: expected true or false for all tensors, found {shown(value)}")


def _as_it_is(value: Any, what: str) -> Any:
    return value
