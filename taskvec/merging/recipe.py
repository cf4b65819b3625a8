"""mergekit's merge files (https://github.com/arcee-ai/mergekit), for the methods that both have.

A model is a `.lota` file, or a checkpoint whose difference from the base is taken on the fly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from taskvec_formats import Checkpoint, Header, Identity

from ..diff import diff
from ..errors import UsageError
from ..files import open_checkpoint
from ..progress import Progress, silent
from ..source import Memory
from ..vector import TaskVector
from .merge import merge
from .registry import AUTO, method_of
from .settings import Rule, Setting

# what mergekit calls otherwise: its linear averages whole models, its task_arithmetic adds up what they changed
_METHODS = {"task_arithmetic": "linear", "linear": "average"}
_KEYS = ("models", "merge_method", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer")
_OF_A_MODEL = ("weight", "density", "gamma")
_OF_ALL = (*_OF_A_MODEL, "lambda", "normalize", "rescale", "int8_mask", "dialect", "elect", "seed", "on_overlap")


@dataclass(frozen=True)
class Model:
    """reference: a `.lota` file, a model folder or a Hub id. parameters: its own, as in the file."""

    reference: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What a merge file asks for.

    method: by its name here. models: in their order. base: a reference, or None. dtype: of the resulting model, or None
    for the base's. parameters: those that hold for all models, as in the file.
    """

    method: str
    models: Sequence[Model]
    base: str | None
    dtype: str | None
    parameters: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read a file. Raises UsageError, naming it, where it is missing or asks for what cannot be done."""
        try:
            return _recipe(yaml.load(path.read_text(encoding="utf-8"), _Loader))
        except FileNotFoundError:
            raise UsageError(f"{path}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read as UTF-8 text ({error})") from None
        except yaml.YAMLError as error:
            raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None

    def open_base(self) -> Checkpoint | None:
        """The base, where one is named. Raises the errors of `open_checkpoint`."""
        return None if self.base is None else open_checkpoint(self.base)

    def vectors(self, base: Checkpoint | None = None, progress: Progress = silent) -> list[TaskVector]:
        """What is merged, in order. base: what `open_base` gave. Raises the errors of `diff` and of opening files."""
        return [self._vector(model, base, progress) for model in self._merged]

    @property
    def _merged(self) -> list[Model]:
        # for mergekit the base is one of the models that are averaged; elsewhere it brings nothing
        return [model for model in self.models if self.method == "average" or model.reference != self.base]

    def merge(self, vectors: Sequence[TaskVector], progress: Progress = silent) -> TaskVector:
        """Merge what `vectors` gave. Raises the errors of `merge`."""
        known = {} if self.method == AUTO else method_of(self.method).options
        apart = (*_OF_A_MODEL, "lambda", "int8_mask", "rescale")
        options = {name: value for name, value in self.parameters.items() if name not in apart}
        if "dialect" in known:
            options.setdefault("dialect", "mergekit")
        if "rescale" in self.parameters:
            options["rescale"] = "norm" if self.parameters["rescale"] else "none"
        sources = [*(model.parameters for model in self._merged), self.parameters]
        gammas = [_setting(source["gamma"]) for source in sources if "gamma" in source]
        if gammas:
            if any(gamma != gammas[0] for gamma in gammas) or not isinstance(gammas[0], float):
                raise UsageError("gamma must be one number for all models")
            options["gamma"] = gammas[0]
        density = [self._of(model, "density") for model in self._merged]
        asked = any(each is not None for each in density)
        return merge(
            vectors,
            self.method,
            [_or_one(self._of(model, "weight")) for model in self._merged],
            progress,
            density=[_or_one(each) for each in density] if asked or "density" in known else None,
            lam=_setting(self.parameters.get("lambda", 1.0)),
            **options,
        )

    def _of(self, model: Model, name: str) -> Setting | None:
        """A model's setting; where its rules do not fit, that of all models."""
        own, shared = (
            _setting(source[name]) if name in source else None for source in (model.parameters, self.parameters)
        )
        if own is None or shared is None:
            return shared if own is None else own
        rules = _rules(own)
        return own if rules is None else [*rules, *(_rules(shared) or [Rule(shared)])]  # type: ignore[arg-type]

    def _vector(self, model: Model, base: Checkpoint | None, progress: Progress) -> TaskVector:
        if model.reference.endswith(".lota"):
            return TaskVector.open(model.reference)
        if base is None:
            raise UsageError(f"{model.reference} is a checkpoint: base_model must say what it was tuned from")
        if model.reference == self.base:
            identity = Identity(base.name, base.fingerprint)
            return TaskVector(Header("vector", identity, None, tensors=()), [], Memory({}, {}), base.name)
        return diff(base, open_checkpoint(model.reference), progress=progress)


class _Loader(yaml.SafeLoader):
    """Refuses keys that are given twice; YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _recipe(document: Any) -> Recipe:
    if not isinstance(document, dict):
        raise UsageError(f"expected keys such as merge_method and models, found {type(document).__name__}")
    for key in ("slices", "modules"):
        if key in document:
            raise UsageError(f"{key!r} is not supported: models are merged whole, under 'models'")
    _known(document, _KEYS, "key")
    _base_tokenizer(document)
    method = document.get("merge_method")
    if not isinstance(method, str):
        raise UsageError(f"merge_method names a method, found {method!r}")
    if method != AUTO:
        method_of(_METHODS.get(method, method))
    models = document.get("models")
    if not isinstance(models, list) or not models:
        raise UsageError("'models' must be a list of models")
    parameters = _parameters(document.get("parameters"), _OF_ALL)
    if method == "linear" and parameters.get("normalize") is False:
        raise UsageError("a linear merge without normalize would scale the base: use task_arithmetic")
    base = document.get("base_model")
    if base is not None and not isinstance(base, str):
        raise UsageError(f"base_model is a path or a Hub id, found {base!r}")
    if method == "linear":
        parameters.pop("normalize", None)
    dtype = document.get("out_dtype") or document.get("dtype")
    return Recipe(_METHODS.get(method, method), [_model(each) for each in models], base, dtype, parameters)


def _model(entry: Any) -> Model:
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
        raise UsageError(f"a model is {{model: PATH, parameters: …}}, found {entry!r}")
    _known(entry, ("model", "parameters"), f"key of model {entry['model']}")
    return Model(entry["model"], _parameters(entry.get("parameters"), _OF_A_MODEL))


def _parameters(document: Any, names: Sequence[str]) -> dict[str, Any]:
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise UsageError(f"parameters are names and values, found {document!r}")
    _known(document, names, "parameter")
    return document


def _known(document: Mapping[str, Any], names: Sequence[str], what: str) -> None:
    for key in document:
        if key not in names:
            raise UsageError(f"unknown {what} {key!r}; known here are {', '.join(names)}")


def _base_tokenizer(document: Mapping[str, Any]) -> None:
    tokenizer = document.get("tokenizer") or {}
    source = tokenizer.get("source", "base") if isinstance(tokenizer, dict) else tokenizer
    more = set(tokenizer) - {"source"} if isinstance(tokenizer, dict) else set()
    if document.get("tokenizer_source") not in (None, "base") or source != "base" or more:
        raise UsageError("the tokenizer is always the base's: tokenizer_source must be 'base' or left out")


def _setting(value: Any) -> Setting:
    """A parameter as mergekit writes it: a number, a list of numbers, {value, filter} or a list of those."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        rules = []
        for each in value:
            if not isinstance(each, dict) or "value" not in each or set(each) - {"value", "filter"}:
                raise UsageError(f"a rule is {{filter: NAME, value: NUMBER}}, found {each!r}")
            rules.append(Rule(_setting(each["value"]), each.get("filter")))  # type: ignore[arg-type]
        return rules
    if isinstance(value, list):
        return [_number(each) for each in value]
    return _number(value)


def _number(value: Any) -> float:
    # YAML reads 1e-3 as text
    try:
        if not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise UsageError(f"expected a number, found {value!r}")


def _rules(setting: Setting) -> list[Rule] | None:
    """The rules that a setting is, or None for a number or a gradient."""
    if not isinstance(setting, Sequence):
        return None
    rules = [each for each in setting if isinstance(each, Rule)]
    return rules or None


def _or_one(setting: Setting | None) -> Setting:
    return 1.0 if setting is None else setting
