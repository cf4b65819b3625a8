"""Parameters of a merge file, parsed as mergekit parses them and checked for the place where they are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from taskvec_formats.text import printable

from ..arguments import shown
from ..errors import UsageError
from ..merging.methods.options import Option
from ..merging.registry import AUTO, METHODS, method_of
from ..merging.settings import Rule, Setting, number_of, numbers_of
from .methods.table import WHOLE, WholeMethod

SETTINGS = ("weight", "density", "lambda")  # may differ between tensors, for every method on task vectors
# the spellings that pydantic accepts, with which mergekit parses merge files
_TRUE = (True, 1, "1", "on", "t", "true", "y", "yes")
_FALSE = (False, 0, "0", "off", "f", "false", "n", "no")


def names_for_all() -> list[str]:
    """The parameters that may be given for all models: those of every method, and int8_mask, which has no effect."""
    options = (name for each in METHODS.values() for name in each.options)
    return list(
        dict.fromkeys(
            [*SETTINGS, "int8_mask", *options, *(name for each in WHOLE.values() for name in each.parameters)]
        )
    )


def names_for_a_model(method: WholeMethod | str) -> list[str]:
    """The parameters that may be given for one model: weight, density, scale and options of type float.

    Those that a method on whole models reads once for all models are left out.
    """
    numbers = [name for each in METHODS.values() for name, option in each.options.items() if option.kind is float]
    own = [name for each in WHOLE.values() for name, each_of in each.parameters.items() if each_of.scope != "all"]
    shared = (
        [name for name, each_of in method.parameters.items() if each_of.scope == "all"]
        if isinstance(method, WholeMethod)
        else []
    )
    return [name for name in dict.fromkeys(["weight", "density", *own, *numbers]) if name not in shared]


def parameters_of(
    document: Any, named: str, method: WholeMethod | str, known: Sequence[str], owner: str, notes: list[str]
) -> dict[str, Any]:
    """Read the parameters of all models, or of one, and keep those that have an effect.

    Args:
        document: The value in the file. None if it is absent.
        named: The name of the method in the file.
        method: The method.
        known: The names that are allowed in this place.
        owner: The prefix of errors and notes: "model NAME: " or "".
        notes: A sentence is appended for each parameter that has no effect.

    Returns:
        Name -> value: a Setting for numbers, a bool for rescale and for options of type bool. Other values are
        unchanged, and so is None if the option accepts it.

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


def _reader(name: str, method: WholeMethod | str) -> Callable[[Any, str], Any]:
    read: Callable[[Any, str], Any]
    if isinstance(method, WholeMethod):
        parameter = method.parameters[name]
        read = _boolean if parameter.kind is bool else _setting
        optional = parameter.default is None
    else:
        option: Option | None = None if method == AUTO else method_of(method).options.get(name)
        kind = None if option is None else option.kind
        if name in SETTINGS or kind is float:
            read = _setting
        else:
            # rescale is a choice in taskvec and a boolean in mergekit
            read = _boolean if name in ("normalize", "rescale") or kind is bool else _unchanged
        optional = option is not None and option.optional and kind is not None
    return (lambda value, what: None if value is None else read(value, what)) if optional else read


def _has_effect(name: str, method: WholeMethod | str) -> bool:
    """Whether a parameter has an effect on a method.

    For `auto` every parameter counts as having one, so that `merge` refuses options instead of ignoring them.
    """
    if name == "int8_mask":
        return False
    if isinstance(method, WholeMethod):
        return name in method.parameters
    if method == AUTO or name == "lambda":
        return True
    known = method_of(method)
    if name == "weight":
        return known.weighs
    return name in known.options or (name == "density" and known.prune is not None)


def combined(name: str, scopes: Sequence[Mapping[str, Any]]) -> Any:
    """A parameter that several parts of a merge file may give.

    Args:
        name: The parameter.
        scopes: The parameters of these parts, that of the highest precedence first.

    Returns:
        The value of the first part that gives one. If it consists of rules, those of the next part follow, because they
        apply to the tensors that match no rule. None if no part gives a value.
    """
    found: list[Rule] = []
    for value in (scope[name] for scope in scopes if scope.get(name) is not None):
        rules = rules_of(value)
        if rules is None:
            return [*found, Rule(value)] if found else value
        found += rules
    return found or None


def rules_of(setting: Any) -> list[Rule] | None:
    """The rules of a setting, or None for a number or a gradient."""
    if not isinstance(setting, Sequence) or isinstance(setting, str):
        return None
    return [each for each in setting if isinstance(each, Rule)] or None


def with_default(setting: Setting | None, default: float) -> Setting:
    """The setting, with a default for all tensors that it gives no value."""
    if setting is None:
        return default
    rules = rules_of(setting)
    return [*rules, Rule(default)] if rules else setting


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
