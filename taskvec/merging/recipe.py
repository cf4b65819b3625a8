"""mergekit's merge files (https://github.com/arcee-ai/mergekit), for the methods that both have.

A model is a `.lota` file, or a checkpoint whose difference from the base is taken on the fly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskvec_formats import Checkpoint, Header, Identity
from taskvec_formats.text import printable

from ..applying.output import TARGETS
from ..arguments import shown
from ..documents import read_document
from ..errors import UsageError
from ..hub import open_checkpoint
from ..reporting.progress import Progress, silent
from ..vectors.diff import diff
from ..vectors.promotion import wider
from ..vectors.source import Memory
from ..vectors.vector import TaskVector
from .average import average
from .combine import merge
from .methods.options import Option
from .parameters import SETTINGS, names_for_a_model, names_for_all, parameters_of
from .registry import AUTO, method_of
from .settings import Rule, Setting, described

# what mergekit calls otherwise: its linear averages whole models, its task_arithmetic adds up what they changed
_METHODS = {"task_arithmetic": "linear", "linear": "average"}
_KEYS = ("models", "merge_method", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer")
# parts of models, which mergekit puts together
_REFUSED = ("slices", "modules")


@dataclass(frozen=True)
class Model:
    """reference: a `.lota` file, a model folder or a Hub id. parameters: its own settings."""

    reference: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What a merge file asks for.

    path: of the file, for errors. method: by its name here. models: in their order. base: a reference, or None.
    dtype: of the resulting model, or None for the base's, or for the widest of several. within: the dtype in which
    mergekit computes. parameters: those that hold for all models. notes: sentences about keys that have no effect.
    """

    path: Path
    method: str
    models: Sequence[Model]
    base: str | None
    dtype: str | None
    within: str | None
    parameters: Mapping[str, Any]
    notes: Sequence[str]

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read a file. Raises UsageError, naming it, where it is missing or asks for what cannot be done."""
        with _naming(path):
            return _recipe(path, read_document(path))

    @property
    def start(self) -> str | None:
        """What the result is relative to: base_model; or, where models are averaged without one, the first of them."""
        if self.base is not None or self.method != "average":
            return self.base
        return next((model.reference for model in self.models if not model.reference.endswith(".lota")), None)

    def open_base(self) -> Checkpoint | None:
        """The checkpoint that `start` names, where there is one. Raises the errors of `open_checkpoint`."""
        with _naming(self.path):
            return None if self.start is None else open_checkpoint(self.start)

    def vectors(self, base: Checkpoint | None = None, progress: Progress = silent) -> list[TaskVector]:
        """What is merged, in order. base: what `open_base` gave. Raises the errors of `diff` and of opening files."""
        with _naming(self.path):
            if not self._merged:
                raise UsageError("nothing to merge: 'models' lists none but base_model")
            return [self._vector(model, base, progress) for model in self._merged]

    @property
    def _merged(self) -> list[Model]:
        if self.method != "average":
            return [model for model in self.models if model.reference != self.base]
        # for mergekit the base is one of the models that are averaged, by the weight of all models if it has none
        listed = self.base is None or any(model.reference == self.base for model in self.models)
        joins = not listed and "weight" in self.parameters
        return [*self.models, Model(self.base, {})] if joins and self.base else list(self.models)

    def merge(
        self,
        vectors: Sequence[TaskVector],
        progress: Progress = silent,
        base: Checkpoint | None = None,
        dtype: str | None = None,
    ) -> TaskVector:
        """Merge what `vectors` gave.

        Args:
            vectors: What `vectors` gave.
            progress: Called while masks are compared.
            base: What `open_base` gave. Gradients are read over its layers, and whole models are averaged.
            dtype: In which dtype a model folder is going to be written; None for a `.lota` file and for the base's.

        Raises:
            UsageError: The settings cannot be meant; the other errors of `merge`.
        """
        found = [self._of(model, "weight") for model in self._merged]
        weights = [1.0 if weight is None else weight for weight in found]
        with _naming(self.path):
            if self.method == "average" and base is not None:
                within = self.within if dtype else None
                merged = average(vectors, base, weights, progress, dtype=within, out_dtype=dtype)
            else:
                merged = self._merge(vectors, weights, progress, base)
        merged.provenance["notes"][:0] = self.notes
        return merged

    def notes_on_file(self) -> list[str]:
        """Sentences about what is asked for and has no effect on a `.lota` file."""
        dtype = [f"dtype {self.dtype} has no effect on a .lota file: a model folder is written in it"]
        start = [f"the file is relative to {self.start}, the first of the models"] if self.start else []
        return [*(dtype if self.dtype else []), *(start if self.base is None else [])]

    def _merge(
        self, vectors: Sequence[TaskVector], weights: Sequence[Setting], progress: Progress, base: Checkpoint | None
    ) -> TaskVector:
        known = {} if self.method == AUTO else method_of(self.method).options
        options = {name: value for name, value in self.parameters.items() if name not in SETTINGS}
        if "dialect" in known:
            options.setdefault("dialect", "mergekit")
        if "rescale" in options:
            options["rescale"] = "norm" if options["rescale"] else "none"
        for name, option in known.items():
            if option.kind is float and any(self._of(model, name) is not None for model in self._merged):
                options[name] = self._shared(option)
        density = [self._of(model, "density") for model in self._merged]
        asked = any(each is not None for each in density)
        return merge(
            vectors,
            self.method,
            weights,
            progress,
            density=[_else_one(each) for each in density] if asked or self._prunes else None,
            lam=_else_one(self.parameters.get("lambda")),
            base=base,
            **options,
        )

    def _shared(self, option: Option) -> float:
        """An option of the method, a number. Raises UsageError if it is a rule, or differs between models."""
        found = [self._of(model, option.name) for model in self._merged]
        numbers = [option.default if number is None else number for number in found]
        for model, number in zip(self._merged, numbers, strict=True):
            if not isinstance(number, float) or number != numbers[0]:
                raise UsageError(
                    f"{option.name} must be one number for all models, found {shown(described(number))} for "
                    f"{model.reference} (it is {option.default:g} where it is left out)"
                )
        return float(numbers[0])  # type: ignore[arg-type]  # as has just been checked

    @property
    def _prunes(self) -> bool:
        return self.method != AUTO and method_of(self.method).prune is not None

    def _of(self, model: Model, name: str) -> Setting | None:
        """A model's setting; where its rules do not fit, that of all models."""
        own, shared = model.parameters.get(name), self.parameters.get(name)
        if own is None or shared is None:
            return shared if own is None else own
        rules = _rules(own)
        return own if rules is None else [*rules, *(_rules(shared) or [Rule(shared)])]

    def _vector(self, model: Model, base: Checkpoint | None, progress: Progress) -> TaskVector:
        if model.reference.endswith(".lota"):
            return TaskVector.open(model.reference)
        if base is None:
            raise UsageError(f"{model.reference} is a checkpoint: base_model must say what it was tuned from")
        if model.reference == self.start:
            identity = Identity(base.name, base.fingerprint)
            return TaskVector(Header("vector", identity, None, tensors=()), [], Memory({}, {}), base.name)
        return diff(base, wider(base, open_checkpoint(model.reference)), progress=progress)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Within the block a UsageError names the file."""
    try:
        yield
    except UsageError as error:
        raise type(error)(f"{path}: {error}") from None


def _recipe(path: Path, document: Any) -> Recipe:
    if not isinstance(document, dict):
        raise UsageError(f"expected keys such as merge_method and models, found {type(document).__name__}")
    for key in _REFUSED:
        if key in document:
            raise UsageError(f"{key!r} is not supported: models are merged whole, under 'models'")
    named = document.get("merge_method")
    if not isinstance(named, str):
        raise UsageError(f"merge_method names a method, found {shown(named)}")
    method = _METHODS.get(named, named)
    _check_method(method)
    _base_tokenizer(document)
    notes = [f"the key {printable(key, 80)} has no effect" for key in _others(document, _KEYS, "", "the document")]
    parameters = parameters_of(document.get("parameters"), named, method, names_for_all(), "", notes)
    models = document.get("models")
    if not isinstance(models, list) or not models:
        raise UsageError("'models' must be a list of models")
    base = document.get("base_model")
    if base is not None and not _is_reference(base):
        raise UsageError(f"base_model is a path or a Hub id, found {shown(base)}")
    if method == "average" and parameters.pop("normalize", True) is False:
        raise UsageError("a linear merge without normalize would scale the base: use task_arithmetic")
    within, out = (_dtype(document, key) for key in ("dtype", "out_dtype"))
    read = [_model(each, named, method, notes) for each in models]
    return Recipe(path, method, read, base, out or within, within, parameters, list(dict.fromkeys(notes)))


def _check_method(method: str) -> None:
    if method != AUTO:
        try:
            method_of(method)
        except UsageError as error:
            raise UsageError(f"merge_method: {error}, task_arithmetic") from None


def _model(entry: Any, named: str, method: str, notes: list[str]) -> Model:
    if not isinstance(entry, dict) or not _is_reference(entry.get("model")):
        raise UsageError(f"a model is {{model: PATH, parameters: …}}, found {shown(entry)}")
    reference = entry["model"]
    owner = f"model {printable(reference, 80)}"
    keys = _others(entry, ("model", "parameters"), f" of {owner}", owner)
    notes += [f"{owner}: the key {printable(key, 80)} has no effect" for key in keys]
    found = parameters_of(entry.get("parameters"), named, method, names_for_a_model(), f"{owner}: ", notes)
    return Model(reference, found)


def _is_reference(value: Any) -> bool:
    """Whether a value may be a path or a Hub id: a line of text."""
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= 1024


def _others(document: Mapping[str, Any], known: Sequence[str], of: str, where: str) -> list[str]:
    """The keys that mergekit passes over. Raises UsageError for a setting that is not among the parameters."""
    others = [key for key in document if key not in known]
    for key in others:
        if key in names_for_all():
            raise UsageError(f"unknown key{of} {key!r}: settings belong under the 'parameters' of {where}")
    return others


def _dtype(document: Mapping[str, Any], key: str) -> str | None:
    value = document.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or value.removeprefix("torch.") not in TARGETS:
        raise UsageError(f"{key} is one of {', '.join(TARGETS)}, found {shown(value)}")
    return value.removeprefix("torch.")


def _base_tokenizer(document: Mapping[str, Any]) -> None:
    tokenizer = document.get("tokenizer") or {}
    source = tokenizer.get("source", "base") if isinstance(tokenizer, dict) else tokenizer
    more = set(tokenizer) - {"source"} if isinstance(tokenizer, dict) else set()
    if document.get("tokenizer_source") not in (None, "base") or source != "base" or more:
        raise UsageError("the tokenizer is always the base's: tokenizer_source must be 'base' or left out")


def _rules(setting: Setting) -> list[Rule] | None:
    """The rules that a setting is, or None for a number or a gradient."""
    if not isinstance(setting, Sequence):
        return None
    rules = [each for each in setting if isinstance(each, Rule)]
    return rules or None


def _else_one(setting: Setting | None) -> Setting:
    """A setting, or where there is none, for all tensors or for some, 1: mergekit's default."""
    rules = None if setting is None else _rules(setting)
    return [*rules, Rule(1.0)] if rules else 1.0 if setting is None else setting
