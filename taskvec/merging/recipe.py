"""Merge files of mergekit (https://github.com/arcee-ai/mergekit), for the methods that taskvec implements too.

A model in a merge file is a `.lota` file, or a checkpoint whose difference from the base is computed when it is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
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
from ..vectors.found import is_vector
from ..vectors.promotion import wider
from ..vectors.source import Memory
from ..vectors.vector import TaskVector
from .average import average
from .combine import merge
from .methods.options import Option
from .parameters import SETTINGS, names_for_a_model, names_for_all, parameters_of
from .registry import AUTO, method_of
from .settings import Rule, Setting, described

# mergekit's name -> taskvec's: mergekit's linear averages whole models, its task_arithmetic adds weighted differences
_METHODS = {"task_arithmetic": "linear", "linear": "average"}
_KEYS = ("models", "merge_method", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer")
# mergekit assembles a model from such parts; taskvec merges whole models only
_REFUSED = ("slices", "modules")


@dataclass(frozen=True)
class Model:
    """One model of a merge file.

    Attributes:
        reference: A `.lota` file, a model folder or a Hub id.
        parameters: The parameters of this model alone.
    """

    reference: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A merge file that was read and checked.

    Attributes:
        path: The merge file, named in errors.
        method: The merge method, under its name in taskvec.
        models: The models, in the order of the file.
        base: A reference to the base, or None.
        dtype: The dtype of the resulting model. None means the base's, or the widest of several models.
        within: The dtype in which mergekit computes, or None.
        parameters: The parameters that apply to all models.
        notes: Sentences about keys that have no effect.
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
        """Read a merge file.

        Args:
            path: The merge file.

        Raises:
            UsageError: The file is missing, or it asks for something that is not supported. The error names the file.
        """
        with _naming(path):
            return _recipe(path, read_document(path))

    @property
    def start(self) -> str | None:
        """The reference that the result is relative to, or None.

        It is base_model. If models are averaged without a base_model, it is the first of them that is a checkpoint.
        """
        if self.base is not None or self.method != "average":
            return self.base
        return next((model.reference for model in self.models if not is_vector(model.reference)), None)

    def open_base(self) -> Checkpoint | None:
        """Open the checkpoint that `start` names.

        Returns:
            The checkpoint, or None if `start` is None.

        Raises:
            UsageError: As in `open_checkpoint`, whose other errors are raised too.
        """
        with _naming(self.path):
            return None if self.start is None else open_checkpoint(self.start)

    def vectors(self, base: Checkpoint | None = None, progress: Progress = silent) -> list[TaskVector]:
        """Open or compute the vectors to merge.

        Args:
            base: The result of `open_base`.
            progress: Called while checkpoints are compared with the base.

        Returns:
            One vector per model, in order.

        Raises:
            UsageError: There is nothing to merge, or a checkpoint has no base. The errors of `diff` and of opening
                files are raised too.
        """
        with _naming(self.path):
            if not self._merged:
                raise UsageError("nothing to merge: 'models' lists only base_model")
            return [self._vector(model, base, progress) for model in self._merged]

    @property
    def _merged(self) -> list[Model]:
        if self.method != "average":
            return [model for model in self.models if model.reference != self.base]
        # mergekit averages the base too if it is listed, or if `parameters` give a weight to all models
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
        """Merge the vectors of the recipe.

        Args:
            vectors: The result of `vectors`.
            progress: Called while masks are compared.
            base: The result of `open_base`. Gradients are read over its layers, and whole models are averaged relative
                to it.
            dtype: The dtype of the model folder that will be written. None for a `.lota` file, or to keep the base's
                dtypes.

        Returns:
            The merged vector. Its provenance contains the notes of the recipe.

        Raises:
            UsageError: The parameters are inconsistent. The other errors of `merge` are raised too.
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
        """Sentences about parts of the recipe that have no effect on a `.lota` file."""
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
            given = any(name in self.parameters or name in model.parameters for model in self._merged)
            if option.kind is float and given:
                options[name] = self._shared(option)
        density = [self._of(model, "density") for model in self._merged]
        asked = any(each is not None for each in density)
        return merge(
            vectors,
            self.method,
            weights,
            progress,
            density=[_or_one(each) for each in density] if asked or self._prunes else None,
            lam=_or_one(self.parameters.get("lambda")),
            base=base,
            **options,
        )

    def _shared(self, option: Option) -> float | None:
        """The value of a numeric option of the method.

        Raises UsageError if it is a rule or a gradient, or if it differs between models.
        """
        default = self.parameters.get(option.name, option.default)
        values: list[Any] = [model.parameters.get(option.name, default) for model in self._merged]
        for model, value in zip(self._merged, values, strict=True):
            if not isinstance(value, (int, float, NoneType)) or value != values[0]:
                found = None if value is None else described(value)
                raise UsageError(
                    f"{option.name} must be one number for all models, found {shown(found)} for "
                    f"{model.reference} (the default is {shown(option.default)})"
                )
        shared: float | None = values[0]
        return shared

    @property
    def _prunes(self) -> bool:
        return self.method != AUTO and method_of(self.method).prune is not None

    def _of(self, model: Model, name: str) -> Setting | None:
        """A parameter of a model. If it consists of rules, those of all models are appended."""
        own, shared = model.parameters.get(name), self.parameters.get(name)
        if own is None or shared is None:
            return shared if own is None else own
        rules = _rules(own)
        return own if rules is None else [*rules, *(_rules(shared) or [Rule(shared)])]

    def _vector(self, model: Model, base: Checkpoint | None, progress: Progress) -> TaskVector:
        if is_vector(model.reference):
            return TaskVector.open(model.reference)
        if base is None:
            raise UsageError(f"{model.reference} is a checkpoint: base_model must name its base")
        if model.reference == self.start:
            identity = Identity(base.name, base.fingerprint)
            return TaskVector(Header("vector", identity, None, tensors=()), [], Memory({}, {}), base.name)
        return diff(base, wider(base, open_checkpoint(model.reference)), progress=progress)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Prefix the message of a UsageError with the path of the merge file, and write its options as keys of the file."""
    try:
        yield
    except UsageError as error:
        # in backticks, the command line would turn them into flags, which a recipe does not take
        text = re.sub(r"`(\w+)=([^`]*)`", r"\1: \2", str(error))
        text = re.sub(r"`(\w+)`", r"\1", text)
        raise type(error)(f"{path}: {text}") from None


def _recipe(path: Path, document: Any) -> Recipe:
    if not isinstance(document, dict):
        raise UsageError(f"expected keys such as merge_method and models, found {type(document).__name__}")
    for key in _REFUSED:
        if key in document:
            raise UsageError(f"{key!r} is not supported: models are merged whole, under 'models'")
    named = document.get("merge_method")
    if not isinstance(named, str):
        raise UsageError(f"merge_method must be the name of a method, found {shown(named)}")
    method = _METHODS.get(named, named)
    _check_method(method)
    _check_tokenizer(document)
    notes = [f"the key {printable(key, 80)} has no effect" for key in _unknown(document, _KEYS, "", "the document")]
    parameters = parameters_of(document.get("parameters"), named, method, names_for_all(), "", notes)
    models = document.get("models")
    if not isinstance(models, list) or not models:
        raise UsageError("'models' must be a list of models")
    base = document.get("base_model")
    if base is not None and not _is_reference(base):
        raise UsageError(f"base_model must be a path or a Hub id, found {shown(base)}")
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
        raise UsageError(f"a model must be {{model: PATH, parameters: …}}, found {shown(entry)}")
    reference = entry["model"]
    owner = f"model {printable(reference, 80)}"
    keys = _unknown(entry, ("model", "parameters"), f" of {owner}", owner)
    notes += [f"{owner}: the key {printable(key, 80)} has no effect" for key in keys]
    found = parameters_of(entry.get("parameters"), named, method, names_for_a_model(), f"{owner}: ", notes)
    return Model(reference, found)


def _is_reference(value: Any) -> bool:
    """Whether a value can be a path or a Hub id: one line of printable text."""
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= 1024


def _unknown(document: Mapping[str, Any], known: Sequence[str], of: str, where: str) -> list[str]:
    """The keys that are not known, which mergekit ignores.

    Raises UsageError for a parameter that is not under `parameters`.
    """
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


def _check_tokenizer(document: Mapping[str, Any]) -> None:
    tokenizer = document.get("tokenizer") or {}
    source = tokenizer.get("source", "base") if isinstance(tokenizer, dict) else tokenizer
    more = set(tokenizer) - {"source"} if isinstance(tokenizer, dict) else set()
    if document.get("tokenizer_source") not in (None, "base") or source != "base" or more:
        raise UsageError("the tokenizer is always the base's: tokenizer_source must be 'base' or left out")


def _rules(setting: Setting) -> list[Rule] | None:
    """The rules of a setting, or None for a number or a gradient."""
    if not isinstance(setting, Sequence):
        return None
    rules = [each for each in setting if isinstance(each, Rule)]
    return rules or None


def _or_one(setting: Setting | None) -> Setting:
    """The setting, with mergekit's default of 1 for all tensors that it gives no value."""
    rules = None if setting is None else _rules(setting)
    return [*rules, Rule(1.0)] if rules else 1.0 if setting is None else setting
