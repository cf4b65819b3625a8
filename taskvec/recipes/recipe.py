"""Merge files of mergekit (https://github.com/arcee-ai/mergekit), read and checked before any model is opened."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from taskvec_formats import Checkpoint
from taskvec_formats.text import printable

from ..applying.output import TARGETS
from ..arguments import shown
from ..documents import read_document
from ..errors import UsageError
from ..hub import open_checkpoint
from ..interop.names import adapter_at
from ..vectors.found import is_vector
from .methods.table import WholeMethod, find_method
from .parameters import names_for_a_model, names_for_all, parameters_of
from .references import adapted, split

_KEYS = (
    "models",
    "slices",
    "modules",
    "merge_method",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)

_MULTIPLE = 1 << 20  # the largest pad_to_multiple_of; larger vocabularies are mistakes


@dataclass(frozen=True)
class Source:
    """A model of a merge file, or some of its layers.

    Attributes:
        model: A `.lota` file, a model folder, a Hub id or an adapter; or a model and an adapter, "model+adapter".
        parameters: The parameters of this model alone.
        layers: The layers that are taken, [first, end), or None for the whole model.
    """

    model: str
    parameters: Mapping[str, Any]
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Slice:
    """Layers of the result.

    Attributes:
        sources: The models whose layers are merged, each with the same number of layers.
        base: The base of this slice, if it is not that of the document.
        parameters: The parameters of this slice.
    """

    sources: Sequence[Source]
    base: str | None
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Module:
    """A part of the model: the whole of it, or one of its stacks of layers.

    Attributes:
        name: The name in the file; None for the whole model.
        models: The models that are merged whole. Empty if there are slices.
        slices: The slices, in the order of the layers of the result.
        parameters: The parameters of this module.
    """

    name: str | None
    models: Sequence[Source]
    slices: Sequence[Slice]
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Token:
    """Where the embedding of a token comes from.

    Attributes:
        source: A model, None for the default, or "zero".
        token: The token of that model, or its number; None for the same token.
        force: Whether it replaces the embeddings of models that have the token.
    """

    source: str | None
    token: str | int | None
    force: bool


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of the result.

    Attributes:
        source: "base", "union", or a model.
        tokens: Token -> the source of its embedding; tokens that are missing are added.
        multiple: The number of rows of the embeddings is a multiple of this number, or None.
    """

    source: str
    tokens: Mapping[str, Token] = field(default_factory=dict)
    multiple: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A merge file that was read and checked.

    Attributes:
        path: The merge file, named in errors.
        text: Its content.
        named: The merge method, under its name in mergekit.
        method: The merge method: one on whole models, or the name in taskvec of one on task vectors.
        modules: The parts of the model.
        base: A reference to the base, or None.
        dtype: The dtype of the resulting model. None means the base's, or the widest of several models.
        within: The dtype in which mergekit computes, or None.
        parameters: The parameters that apply to all models.
        tokenizer: The tokenizer of the result, or None for that of the base.
        chat_template: The chat template of the result: "auto", the name of a template or its text. None for the
            base's.
        notes: Sentences about keys that have no effect.
    """

    path: Path
    text: str
    named: str
    method: WholeMethod | str
    modules: Sequence[Module]
    base: str | None
    dtype: str | None
    within: str | None
    parameters: Mapping[str, Any]
    tokenizer: Tokenizer | None
    chat_template: str | None
    notes: Sequence[str]

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read a merge file.

        Args:
            path: The merge file.

        Raises:
            UsageError: The file is missing, or it asks for something that is not supported. The error names the file.
        """
        with naming(path):
            return _recipe(path, read_document(path))

    @property
    def sources(self) -> list[Source]:
        """All models that are merged, in the order of the file; a model may occur several times."""
        slices = [each for module in self.modules for each in module.slices]
        whole = [source for module in self.modules for source in module.models]
        return [*whole, *(source for each in slices for source in each.sources)]

    @property
    def has_slices(self) -> bool:
        """Whether the result has other layers than one of the models."""
        return any(module.slices for module in self.modules)

    @cached_property
    def start(self) -> str | None:
        """The model whose config and other files the result has, or None.

        It is base_model. If whole models are merged without a base_model, it is the first of them that is a checkpoint.
        """
        if self.base is not None or not isinstance(self.method, WholeMethod):
            return self.base
        return next((each.model for each in self.sources if not is_vector(each.model)), None)

    def open_start(self) -> Checkpoint | None:
        """Open the checkpoint that `start` names.

        Returns:
            The checkpoint, or None if `start` is None.

        Raises:
            UsageError: As in `open_checkpoint`, whose other errors are raised too.
        """
        with naming(self.path):
            if self.start is None:
                return None
            if is_vector(self.start):
                raise UsageError(f"base_model must be a model, found the task vector {self.start}")
            model, adapter = split(self.start)
            if adapter is None and adapter_at(model) is not None:
                said = "base_model must be a model, found" if self.base else "base_model must name the base of"
                raise UsageError(f"{said} the adapter {self.start}")
            checkpoint = open_checkpoint(model)
            return checkpoint if adapter is None else adapted(checkpoint, adapter)[0]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Prefix the message of a UsageError with the path of the merge file, and write its options as keys of the file."""
    try:
        yield
    except UsageError as error:
        if str(error).startswith(f"{path}: "):
            raise
        # in backticks, the command line would turn them into flags, which a recipe does not take
        text = re.sub(r"`(\w+)=([^`]*)`", r"\1: \2", str(error))
        text = re.sub(r"`(\w+)`", r"\1", text)
        raise type(error)(f"{path}: {text}") from None


def _recipe(path: Path, document: Any) -> Recipe:
    if not isinstance(document, dict):
        raise UsageError(f"expected keys such as merge_method and models, found {type(document).__name__}")
    named = document.get("merge_method")
    if not isinstance(named, str):
        raise UsageError(f"merge_method must be the name of a method, found {shown(named)}")
    reader = _Reader(named, find_method(named))
    reader.notes += [
        f"the key {printable(key, 80)} has no effect" for key in _unknown(document, _KEYS, "", "the document")
    ]
    parameters = reader.parameters(document.get("parameters"), names_for_all(), "")
    modules = reader.modules(document)
    base = _reference_or_none(document, "base_model")
    reader.notes += _without_effect(modules, base, reader.method)
    within, out = (_dtype(document, key) for key in ("dtype", "out_dtype"))
    template = document.get("chat_template")
    if not isinstance(template, str | None):
        raise UsageError(f"chat_template must be auto, the name of a template or its text, found {shown(template)}")
    return Recipe(
        path,
        path.read_text(encoding="utf-8"),
        named,
        reader.method,
        modules,
        base,
        out or within,
        within,
        parameters,
        _tokenizer(document, reader.notes),
        template or None,
        list(dict.fromkeys(reader.notes)),
    )


def _without_effect(modules: Sequence[Module], base: str | None, method: WholeMethod | str) -> list[str]:
    """Notes on parameters of the base as one of the models, for methods that read those of the others only."""
    found = []
    for module in modules:
        listed = [(source, base) for source in module.models]
        listed += [(source, each.base or base) for each in module.slices for source in each.sources]
        for source, own in listed:
            found += [
                f"model {printable(source.model, 80)}: {name} has no effect, because this is the base"
                for name in source.parameters
                if source.model == own
                and (not isinstance(method, WholeMethod) or method.parameters[name].scope == "not base")
            ]
    return found


class _Reader:
    """Reads the parts of a document for one method.

    Attributes:
        notes: Sentences about keys that have no effect.
    """

    def __init__(self, named: str, method: WholeMethod | str) -> None:
        self.named = named
        self.method = method
        self.notes: list[str] = []

    def parameters(self, document: Any, known: Sequence[str], owner: str) -> dict[str, Any]:
        return parameters_of(document, self.named, self.method, known, owner, self.notes)

    def modules(self, document: Mapping[str, Any]) -> list[Module]:
        given = [key for key in ("models", "slices", "modules") if document.get(key) is not None]
        if len(given) > 1:
            raise UsageError(f"{given[0]!r} and {given[1]!r} exclude each other")
        if given != ["modules"]:
            return [self._module(None, document)]
        parts = document["modules"]
        if not isinstance(parts, dict) or not parts:
            raise UsageError(f"'modules' must be names of modules and their models or slices, found {shown(parts)}")
        found = []
        for name, part in parts.items():
            owner = f"module {printable(name, 80)}"
            if not isinstance(part, dict):
                raise UsageError(f"{owner}: expected models or slices, found {shown(part)}")
            self._note_unknown(part, ("models", "slices", "parameters"), owner)
            parameters = self.parameters(part.get("parameters"), names_for_all(), f"{owner}: ")
            found.append(self._module(name, part, parameters, f"{owner}: "))
        return found

    def _module(
        self, name: str | None, part: Mapping[str, Any], parameters: Mapping[str, Any] | None = None, owner: str = ""
    ) -> Module:
        if part.get("slices") is not None:
            if part.get("models") is not None:
                raise UsageError(f"{owner}'models' and 'slices' exclude each other")
            slices = _list(part, "slices", owner)
            found = [self._slice(each, f"{owner}slice {number}: ") for number, each in enumerate(slices, 1)]
            return Module(name, [], found, parameters or {})
        models = [self._model(each) for each in _list(part, "models", owner)]
        return Module(name, models, [], parameters or {})

    def _slice(self, entry: Any, owner: str) -> Slice:
        if not isinstance(entry, dict):
            raise UsageError(f"{owner}expected sources, found {shown(entry)}")
        self._note_unknown(entry, ("sources", "base_model", "parameters"), owner.removesuffix(": "))
        sources = [self._layers(each, owner) for each in _list(entry, "sources", owner)]
        lengths = {source.layers[1] - source.layers[0] for source in sources if source.layers}
        if len(lengths) > 1:
            raise UsageError(
                f"{owner}the sources must have equally many layers, found {', '.join(map(str, sorted(lengths)))}"
            )
        parameters = self.parameters(entry.get("parameters"), names_for_all(), owner)
        return Slice(sources, _reference_or_none(entry, "base_model", owner), parameters)

    def _layers(self, entry: Any, owner: str) -> Source:
        layers = entry.get("layer_range") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not _is_reference(entry.get("model")):
            raise UsageError(
                f"{owner}a source must be {{model: PATH, layer_range: [FIRST, END]}}, found {shown(entry)}"
            )
        if (
            not isinstance(layers, list)
            or len(layers) != 2
            or not all(type(each) is int for each in layers)
            or not 0 <= layers[0] < layers[1]
        ):
            raise UsageError(f"{owner}layer_range must be [FIRST, END] with FIRST below END, found {shown(layers)}")
        source = self._model({key: value for key, value in entry.items() if key != "layer_range"})
        return Source(source.model, source.parameters, (layers[0], layers[1]))

    def _model(self, entry: Any) -> Source:
        if not isinstance(entry, dict) or not _is_reference(entry.get("model")):
            raise UsageError(f"a model must be {{model: PATH, parameters: …}}, found {shown(entry)}")
        reference = entry["model"]
        owner = f"model {printable(reference, 80)}"
        self._note_unknown(entry, ("model", "parameters"), owner)
        return Source(reference, self.parameters(entry.get("parameters"), names_for_a_model(self.method), f"{owner}: "))

    def _note_unknown(self, entry: Mapping[str, Any], known: Sequence[str], owner: str) -> None:
        keys = _unknown(entry, known, f" of {owner}", owner)
        self.notes += [f"{owner}: the key {printable(key, 80)} has no effect" for key in keys]


def _list(part: Mapping[str, Any], key: str, owner: str) -> list[Any]:
    found = part.get(key)
    if not isinstance(found, list) or not found:
        raise UsageError(f"{owner}{key!r} must be a list of {'models' if key != 'slices' else 'slices'}")
    return found


def _reference_or_none(document: Mapping[str, Any], key: str, owner: str = "") -> str | None:
    value = document.get(key)
    if value is not None and not _is_reference(value):
        raise UsageError(f"{owner}{key} must be a path or a Hub id, found {shown(value)}")
    return value


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


def _tokenizer(document: Mapping[str, Any], notes: list[str]) -> Tokenizer | None:
    source, given = document.get("tokenizer_source"), document.get("tokenizer")
    if source and given:
        raise UsageError("'tokenizer_source' and 'tokenizer' exclude each other")
    if not given:
        if source is not None and not _is_reference(source):
            raise UsageError(f"tokenizer_source must be base, union or a model, found {shown(source)}")
        return None if source is None else Tokenizer(source)
    if not isinstance(given, dict):
        raise UsageError(f"tokenizer must be {{source: …, tokens: …}}, found {shown(given)}")
    notes += [
        f"tokenizer: the key {printable(key, 80)} has no effect"
        for key in given
        if key not in ("source", "tokens", "pad_to_multiple_of")
    ]
    source, tokens, multiple = given.get("source", "union"), given.get("tokens"), given.get("pad_to_multiple_of")
    if not _is_reference(source):
        raise UsageError(f"tokenizer: source must be base, union or a model, found {shown(source)}")
    if multiple is not None and (type(multiple) is not int or not 1 <= multiple <= _MULTIPLE):
        raise UsageError(
            f"tokenizer: pad_to_multiple_of must be a whole number from 1 to {_MULTIPLE}, found {shown(multiple)}"
        )
    if not isinstance(tokens, dict | None):
        raise UsageError(f"tokenizer: tokens must be tokens and the sources of their embeddings, found {shown(tokens)}")
    return Tokenizer(source, {token: _token(token, each) for token, each in (tokens or {}).items()}, multiple)


def _token(token: str, document: Any) -> Token:
    owner = f"tokenizer: token {printable(token, 80)}"
    if not token or any("\ud800" <= each <= "\udfff" for each in token):
        raise UsageError(f"{owner}: a token must be text of at least one character, without surrogates")
    document = {} if document is None else document
    if not isinstance(document, dict) or set(document) - {"source", "force"}:
        raise UsageError(f"{owner}: expected {{source: …, force: …}}, found {shown(document)}")
    source, force = document.get("source"), document.get("force", False)
    if not isinstance(force, bool):
        raise UsageError(f"{owner}: force must be true or false, found {shown(force)}")
    if source is None or _is_reference(source):
        return Token(source, None, force)
    kind = source.get("kind") if isinstance(source, dict) else None
    if kind == "zero":
        return Token("zero", None, force)
    number, other = (source.get("token_id"), source.get("token")) if isinstance(source, dict) else (None, None)
    if kind != "model_token" or not _is_reference(source.get("model")) or (number is None) == (other is None):
        raise UsageError(
            f"{owner}: a source is a model, {{kind: zero}} or {{kind: model_token, model: …, token: …}}, "
            f"found {shown(source)}"
        )
    if not (type(number) is int if other is None else isinstance(other, str)):
        raise UsageError(f"{owner}: expected a token or a token_id, found {shown(number if other is None else other)}")
    return Token(source["model"], number if other is None else other, force)
