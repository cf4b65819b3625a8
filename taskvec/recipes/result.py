"""The result of a merge file: a task vector relative to the base, or a model that is computed tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import numpy as np

from taskvec_formats import Change, Checkpoint, Form, Header, Identity, TensorSpec
from taskvec_formats.checkpoint import short
from taskvec_formats.dtypes import DTYPES, DType
from taskvec_formats.forms import Bits

from ..applying.output import TARGETS
from ..applying.overlay import Patched
from ..arguments import shown
from ..errors import MergeError, UsageError
from ..merging.combine import merge
from ..merging.methods.options import Option
from ..merging.narrow import in_dtypes
from ..merging.registry import AUTO, method_of
from ..merging.settings import Setting, described
from ..names import stack_and_layer
from ..reporting.progress import Progress, silent
from ..reporting.throughput import hashed
from ..vectors.delta import BaseBits, diff_range
from ..vectors.diff import diff
from ..vectors.found import is_vector
from ..vectors.layers import counted
from ..vectors.lineage import joined
from ..vectors.promotion import WidenedEntries, promoted, wider
from ..vectors.source import Memory, inputs_of
from ..vectors.vector import TaskVector
from .assembled import Assembled, Piece, taken
from .changes import Changes
from .engine import Computed, WholeTensor
from .methods import WholeMethod
from .parameters import SETTINGS, combined, with_default
from .recipe import Recipe
from .references import Models
from .sections import Section, is_before, is_in, sections_of
from .vocabulary import Vocabulary

_MISSING = object()


@dataclass(frozen=True)
class Result:
    """What a merge file describes.

    Attributes:
        provenance: The method, its options, the models and notes, as in the provenance of a merged vector.
        vector: The merged vector relative to `start`, or None if the result is not one.
        model: The merged model, or None if it is `start` with the vector applied.
        files: Side files that replace those of `start`, by name.
    """

    provenance: dict[str, Any]
    vector: TaskVector | None = None
    model: Assembled | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


def result_of(
    recipe: Recipe,
    models: Models,
    start: Checkpoint | None,
    progress: Progress = silent,
    *,
    dtype: str | None = None,
    within: str | None = None,
) -> Result:
    """Describe the result of a merge file. Its tensors are computed when they are read.

    Args:
        recipe: The merge file.
        models: Its models.
        start: The model that the result is relative to, or None if the file names task vectors only.
        progress: Called while models are compared.
        dtype: The dtype in which the result will be written, or None.
        within: The dtype to which the values of all models are rounded first, and in which the result is computed. None
            takes, for each tensor, the narrowest dtype that holds the values of all models.

    Raises:
        UsageError: The parameters are inconsistent.
        MergeError: The models do not have the same tensors, or differ in one that is not floating point.
        BaseMismatchError, DTypeError, FormatError: As in `merge`.
    """
    method = recipe.method
    if start is None:
        return _of_vectors(recipe, models, progress)
    forms = _Forms(recipe, models, start, within)
    is_one = [module.name for module in recipe.modules] == [None]
    if isinstance(method, WholeMethod) or recipe.has_slices or not is_one:
        sections = sections_of(recipe, models, start)
        return _assembled(recipe, models, start, sections, forms, Changes(recipe, models, start), progress)
    changes = Changes(recipe, models, start)
    if changes.vocabulary is not None or changes.removed or not forms.keeps(start, dtype):
        return _assembled(recipe, models, start, sections_of(recipe, models, start), forms, changes, progress)
    vector = _merged(recipe, models, start, forms, progress)
    vector.provenance["notes"] += changes.notes
    return Result(vector.provenance, vector, files=changes.files)


class _Forms:
    """The dtypes in which tensors are computed.

    Args:
        recipe: The merge file.
        models: Its models.
        start: The model that the result is relative to.
        within: A dtype for all tensors, or None.
    """

    def __init__(self, recipe: Recipe, models: Models, start: Checkpoint, within: str | None) -> None:
        self._within = DTYPES[TARGETS[within]] if within else None
        self._models = {each.model: models[each.model].checkpoint for each in recipe.sources}
        self._start = start

    def of(self, inputs: Sequence[tuple[Checkpoint, str]]) -> DType:
        """Return the dtype in which a tensor is computed.

        Args:
            inputs: The models, and the name of the tensor in each of them.

        Raises:
            MergeError: There is no dtype that holds the values of all models.
        """
        dtype = inputs[0][0].tensors[inputs[0][1]].dtype
        if not dtype.additive:
            return dtype
        if self._within is not None:
            return self._within
        for checkpoint, name in inputs[1:]:
            other = promoted(dtype, checkpoint.tensors[name].dtype)
            if other is None:
                found = checkpoint.tensors[name].dtype.name
                raise MergeError(f"tensor {name!r} is {dtype.name} and {found}: no dtype holds the values of both")
            dtype = other
        return dtype

    def narrow(self) -> dict[str, DType]:
        """Return the tensors that are computed in F16 or BF16, with their dtypes."""
        every = [self._start, *self._models.values()]
        found = {}
        for name in self._start.tensors:
            dtype = self.of([(each, name) for each in every if name in each.tensors])
            if dtype.name in ("F16", "BF16"):
                found[name] = dtype
        return found

    def keeps(self, start: Checkpoint, dtype: str | None) -> bool:
        """Return whether adding deltas to the base and rounding once gives what is computed in these dtypes.

        Args:
            start: The base.
            dtype: The dtype in which the result will be written, or None.
        """
        return all(
            start.tensors[name].dtype == own and (dtype is None or TARGETS[dtype] == own.name)
            for name, own in self.narrow().items()
        )


def _of_vectors(recipe: Recipe, models: Models, progress: Progress) -> Result:
    """The merge of task vectors without a base."""
    method = recipe.method
    if isinstance(method, WholeMethod):
        name = {"linear": "average"}.get(method.name, method.name)
        try:
            method_of(name)
        except UsageError:
            raise UsageError(
                f"{method.name} merges whole models: base_model must name the base of the vectors"
            ) from None
        if method.name == "linear" and recipe.parameters.get("normalize") is False:
            raise UsageError("a linear merge without normalize would scale the base: use task_arithmetic")
    if recipe.has_slices:
        raise UsageError("slices need base_model, or models that are checkpoints")
    if recipe.tokenizer is not None and recipe.tokenizer.source != "base":
        raise UsageError("a tokenizer needs base_model, whose embeddings get its tokens")
    vectors = [_opened(models, each.model) for module in recipe.modules for each in module.models]
    merged = _merge(recipe, vectors, progress, None)
    return Result(merged.provenance, merged)


def _opened(models: Models, reference: str) -> TaskVector:
    if not is_vector(reference):
        raise UsageError(f"{reference} is a checkpoint: base_model must name its base")
    return TaskVector.open(reference)


def _merged(recipe: Recipe, models: Models, start: Checkpoint, forms: _Forms, progress: Progress) -> TaskVector:
    """The merge of task vectors relative to a base."""
    narrow = forms.narrow()
    return _merge(
        recipe,
        [_relative(recipe, models, each.model, start, narrow, progress) for each in _merged_sources(recipe)],
        progress,
        start,
        narrow,
    )


def _merged_sources(recipe: Recipe) -> list[Any]:
    found = [each for module in recipe.modules for each in module.models if each.model != recipe.base]
    if not found:
        raise UsageError("nothing to merge: 'models' lists only base_model")
    return found


def _relative(
    recipe: Recipe, models: Models, reference: str, start: Checkpoint, narrow: Mapping[str, DType], progress: Progress
) -> TaskVector:
    """The vector from the base to a model."""
    opened = models[reference]
    vector = opened.vector
    if vector is not None and all(spec.dtype == narrow.get(name, spec.dtype) for name, spec in vector.specs.items()):
        return vector
    if opened.checkpoint is start:
        identity = Identity(start.name, start.fingerprint)
        return TaskVector(Header("vector", identity, None, tensors=()), [], Memory({}, {}), start.name)
    model = opened.checkpoint
    if any(name in model.tensors and model.tensors[name].dtype != dtype for name, dtype in narrow.items()):
        pieces = {
            name: taken(model, name, narrow[name] if name in narrow and info.dtype.additive else None)
            for name, info in model.tensors.items()
        }
        model = Assembled(model.name, pieces, model, model.inputs)
    return diff(start, wider(start, model), progress=progress)


def _merge(
    recipe: Recipe,
    vectors: Sequence[TaskVector],
    progress: Progress,
    base: Checkpoint | None,
    narrow: Mapping[str, DType] | None = None,
) -> TaskVector:
    """Merge vectors with the parameters of a recipe whose models are merged whole."""
    sources = _merged_sources(recipe)
    scopes = [[each.parameters, recipe.modules[0].parameters, recipe.parameters] for each in sources]
    weights = [with_default(combined("weight", each), 1.0) for each in scopes]
    densities = [combined("density", each) for each in scopes]
    shared = scopes[0][1:]
    given = {name: [_first(name, each) for each in scopes] for name in _numeric(recipe)}
    return _with_options(
        recipe,
        vectors,
        weights,
        densities,
        with_default(combined("lambda", shared), 1.0),
        given,
        [each.model for each in sources],
        progress,
        base,
        narrow,
        shared,
    )


def _first(name: str, scopes: Sequence[Mapping[str, Any]]) -> Any:
    """The value of an option in the first scope that has it, which may be None."""
    return next((scope[name] for scope in scopes if name in scope), _MISSING)


def _numeric(recipe: Recipe) -> list[str]:
    """The options of a method on task vectors that are numbers."""
    known = _known(recipe)
    return [name for name, option in known.items() if option.kind is float]


def _known(recipe: Recipe) -> Mapping[str, Option]:
    name = _name(recipe)
    return {} if name == AUTO else method_of(name).options


def _name(recipe: Recipe) -> str:
    method = recipe.method
    return {"linear": "average"}.get(method.name, method.name) if isinstance(method, WholeMethod) else method


def _with_options(
    recipe: Recipe,
    vectors: Sequence[TaskVector],
    weights: Sequence[Setting],
    densities: Sequence[Setting | None],
    lam: Setting,
    given: Mapping[str, Sequence[Any]],
    references: Sequence[str],
    progress: Progress,
    base: Checkpoint | None,
    narrow: Mapping[str, DType] | None,
    shared: Sequence[Mapping[str, Any]],
) -> TaskVector:
    name, known = _name(recipe), _known(recipe)
    every: dict[str, Any] = {}
    for scope in reversed(shared):
        every |= scope
    options = {key: value for key, value in every.items() if key not in SETTINGS and (key in known or name == AUTO)}
    if "dialect" in known:
        options.setdefault("dialect", "mergekit")
    if "rescale" in options:
        options["rescale"] = "norm" if options["rescale"] else "none"
    for key, values in given.items():
        if any(value is not _MISSING for value in values):
            options[key] = _one_number(known[key], values, references)
    prunes = name != AUTO and method_of(name).prune is not None
    asked = any(each is not None for each in densities)
    weighs = name == AUTO or method_of(name).weighs
    merged = merge(
        [in_dtypes(vector, narrow) for vector in vectors] if narrow else vectors,
        name,
        weights if weighs else None,
        progress,
        density=[with_default(each, 1.0) for each in densities] if asked or prunes else None,
        lam=lam,
        base=base,
        **options,
    )
    merged.provenance["notes"][:0] = recipe.notes
    return merged


def _one_number(option: Option, values: Sequence[Any], references: Sequence[str]) -> float | None:
    """The value of a numeric option of the method.

    Raises UsageError if it is a rule or a gradient, or if it differs between models.
    """
    found = [option.default if value is _MISSING else value for value in values]
    for reference, value in zip(references, found, strict=True):
        if not isinstance(value, (int, float, NoneType)) or value != found[0]:
            said = None if value is None else described(value)
            raise UsageError(
                f"{option.name} must be one number for all models, found {shown(said)} for "
                f"{reference} (the default is {shown(option.default)})"
            )
    number: float | None = found[0]
    return number


def _assembled(
    recipe: Recipe,
    models: Models,
    start: Checkpoint,
    sections: Sequence[Section],
    forms: _Forms,
    changes: Changes,
    progress: Progress,
) -> Result:
    """The result as a model, section by section."""
    pieces: dict[str, Piece] = {}
    notes = [*recipe.notes, *changes.notes]
    _check_tensors(recipe, models, start, sections, changes.vocabulary)
    for section in sections:
        if section.is_partial and len(section.inputs) == 1:
            (only,) = _views(section, models, forms, changes.vocabulary)
            made = {name: taken(only, name, forms.of([(only, name)])) for name in section.names}
        elif isinstance(recipe.method, WholeMethod):
            made = _by_function(recipe.method, section, _views(section, models, forms, changes.vocabulary), forms)
        else:
            views = _views(section, models, forms, changes.vocabulary)
            made, said = _by_vectors(recipe, section, views, forms, progress)
            notes += said
        pieces |= made
    notes += _incomplete(recipe, sections, start, pieces)
    references = dict.fromkeys(each.reference for section in sections for each in section.inputs)
    checkpoints = [models[each].checkpoint for each in references]
    provenance = {
        "made_by": "merge",
        "method": recipe.method.title if isinstance(recipe.method, WholeMethod) else recipe.method,
        "reason": "asked for",
        "options": {},
        "notes": list(dict.fromkeys(notes)),
        "parents": [{"name": each.name} for each in checkpoints],
        "weights": [1.0] * len(checkpoints),
        "lambda": 1.0,
    }
    name = joined([each.name for each in checkpoints], " + ")
    description = f"{recipe.text}\n{start.path}"
    inputs = inputs_of(start, *checkpoints)
    model = Assembled(name, pieces, start, inputs, description, changes.removed)
    return Result(provenance, model=model, files=changes.files)


def _incomplete(
    recipe: Recipe, sections: Sequence[Section], start: Checkpoint, result: Mapping[str, Piece]
) -> list[str]:
    """Notes on tensors that not all sources of a slice have, and on those that the result lacks."""
    if not recipe.has_slices:
        return []
    notes = []
    for section in (each for each in sections if each.is_partial):
        having = ", ".join(each.reference for each in section.inputs)
        notes.append(f"{section.where}tensor {section.names[0]!r} is only in {having}")
    layers: dict[tuple[str, str], list[str]] = {}
    for name in start.tensors:
        place = stack_and_layer(name)
        if place is not None:
            layers.setdefault((place[0], name[len(f"{place[0]}.{place[1]}") :]), []).append(name)
    single = [names[0] for names in layers.values() if len(names) == 1 and names[0] not in result]
    counts = counted(start.tensors)
    return notes + [
        f"the result has no tensor {name!r}, which only this layer of {start.name} has"
        for name in single
        if counts[(stack_and_layer(name) or ("", 0))[0]] > 1
    ]


def _check_tensors(
    recipe: Recipe, models: Models, start: Checkpoint, sections: Sequence[Section], vocabulary: Vocabulary | None
) -> None:
    """Refuse models that lack a tensor, have it in another shape, or have further ones."""
    expected = _Expected(recipe, start, vocabulary)
    for section in sections:
        for name in section.names:
            shapes = {}
            for each in section.inputs:
                model, own = models[each.reference].checkpoint, each.names[name]
                if own not in model.tensors:
                    raise MergeError(f"{section.where}{each.reference} has no tensor {own!r}")
                shapes[each.reference] = model.tensors[own].shape
                if vocabulary is not None and vocabulary.owner(each.reference).has_rows(own):
                    shapes[each.reference] = (vocabulary.size, *shapes[each.reference][1:])
            first = section.inputs[0].reference
            for reference, shape in shapes.items():
                if shape != shapes[first]:
                    raise MergeError(
                        f"{section.where}tensor {name!r} is {list(shapes[first])} in {first} and {list(shape)} in "
                        f"{reference}{_advice(shapes[first], shape)}"
                    )
            expected.check(name, first, shapes[first], section.where)
    for reference, names in _read_by_module(recipe, models):
        if more := sorted(names - start.tensors.keys()):
            raise MergeError(f"{reference} has tensor {more[0]!r}, which {start.name} does not have")
    expected.check_layers({name for section in sections for name in section.names})


class _Expected:
    """The tensors that the model has whose config.json describes the result.

    Args:
        recipe: The merge file.
        start: The model.
        vocabulary: The tokens of the result, if its embeddings have other rows.
    """

    def __init__(self, recipe: Recipe, start: Checkpoint, vocabulary: Vocabulary | None) -> None:
        self._start = start
        self._shapes: dict[tuple[str, str], set[tuple[int, ...]]] = {}  # (stack, rest of the name) -> shapes
        self._layers: dict[str, dict[int, set[str]]] = {}  # stack -> layer -> rests of the names
        for name, info in start.tensors.items():
            stack, layer, rest = _parts(name)
            shape = info.shape
            if vocabulary is not None and recipe.start and vocabulary.owner(recipe.start).has_rows(name):
                shape = (vocabulary.size, *shape[1:])
            self._shapes.setdefault((stack, rest), set()).add(shape)
            self._layers.setdefault(stack, {}).setdefault(layer, set()).add(rest)

    def check(self, name: str, reference: str, shape: tuple[int, ...], where: str) -> None:
        """Refuse a tensor that no layer of the model has, or that has another shape in all of them."""
        stack, _, rest = _parts(name)
        shapes = self._shapes.get((stack, rest))
        if shapes is None:
            raise MergeError(f"{where}{reference} has tensor {name!r}, which no layer of {self._start.name} has")
        if shape not in shapes:
            own = next(iter(sorted(shapes)))
            raise MergeError(
                f"{where}tensor {name!r} is {list(shape)} in {reference} and {list(own)} in {self._start.name}"
                f"{_advice(own, shape)}"
            )

    def check_layers(self, names: Collection[str]) -> None:
        """Refuse a result with a layer that lacks a tensor that all layers of the model have."""
        common = {stack: set.intersection(*layers.values()) for stack, layers in self._layers.items()}
        found: dict[tuple[str, int], set[str]] = {}
        for name in names:
            stack, layer, rest = _parts(name)
            found.setdefault((stack, layer), set()).add(rest)
        for (stack, layer), own in sorted(found.items()):
            if missing := sorted(common[stack] - own):
                name = f"{stack}.{layer}{missing[0]}" if stack else missing[0]
                raise MergeError(f"the result has no tensor {name!r}, and every layer of {self._start.name} has one")


def _parts(name: str) -> tuple[str, int, str]:
    """The stack, the layer and the rest of the name of a tensor. Tensors outside of layers are one layer, -1."""
    place = stack_and_layer(name)
    return ("", -1, name) if place is None else (*place, name[len(f"{place[0]}.{place[1]}") :])


def _read_by_module(recipe: Recipe, models: Models) -> Iterator[tuple[str, set[str]]]:
    """The models that each module reads, with the tensors that the module may have of them.

    Of slices, these are the tensors outside of layers that the first and the last slice give.
    """
    for module in recipe.modules:
        for source in module.models:
            tensors = models[source.model].checkpoint.tensors
            yield source.model, {name for name in tensors if is_in(module.name, name)}
        for place, each in enumerate(module.slices):
            edges = {True: place == 0, False: place == len(module.slices) - 1}
            for source in each.sources:
                names = [name for name in models[source.model].checkpoint.tensors if is_in(module.name, name)]
                yield (
                    source.model,
                    {name for name in names if stack_and_layer(name) is None and edges[is_before(name)]},
                )


def _advice(one: tuple[int, ...], other: tuple[int, ...]) -> str:
    if len(one) == len(other) and one[1:] == other[1:]:
        return "; if these are rows of tokens, tokenizer_source: base or union maps them"
    return ""


def _views(section: Section, models: Models, forms: _Forms, vocabulary: Vocabulary | None) -> list[Checkpoint]:
    """The models of a section, with the names and the tokens of the result."""
    pieces: list[dict[str, Piece]] = [{} for _ in section.inputs]
    for name in section.names:
        inputs = [(models[each.reference].checkpoint, each.names[name]) for each in section.inputs]
        own = [(each.reference, each.names[name]) for each in section.inputs]
        if vocabulary is not None and any(vocabulary.owner(reference).has_rows(other) for reference, other in own):
            base = None if section.base is None else section.inputs[section.base].reference
            found = vocabulary.mapped(name, own, base, forms.of(inputs))
        else:
            found = [taken(*each) for each in inputs]
        for held, piece in zip(pieces, found, strict=True):
            held[name] = piece
    checkpoints = [models[each.reference].checkpoint for each in section.inputs]
    return [
        Assembled(checkpoint.name, held, checkpoint, checkpoint.inputs)
        for checkpoint, held in zip(checkpoints, pieces, strict=True)
    ]


def _by_function(method: WholeMethod, section: Section, views: Sequence[Checkpoint], forms: _Forms) -> dict[str, Piece]:
    """The tensors of a section, merged by a method on whole models."""
    method.check(len(section.inputs), has_base=section.base is not None, where=section.where)
    base = section.base if method.base != "ignored" else None
    found = {}
    for name in section.names:
        inputs = [(view, name) for view in views]
        first, own = inputs[0]
        form = first.tensors[own].form
        numbers = section.numbers(method, name)
        if not form.dtype.additive:
            _check_alike(name, section, inputs)
            found[name] = taken(first, own)
            continue
        form = Form(forms.of(inputs), form.shape)
        if method.name == "passthrough" and numbers["scale"][0] is None:
            found[name] = taken(first, own, form.dtype)
            continue
        tensor = WholeTensor(name, form, inputs, base, numbers)
        found[name] = Piece(form, Computed(tensor, method.function))
    return found


def _check_alike(name: str, section: Section, inputs: Sequence[tuple[Checkpoint, str]]) -> None:
    """Refuse tensors of integers or booleans that differ between models."""
    first, own = inputs[0]
    for each, (other, theirs) in zip(section.inputs[1:], inputs[1:], strict=True):
        if other.tensors[theirs].dtype != first.tensors[own].dtype or any(
            not np.array_equal(first.bits(own, *block), other.bits(theirs, *block))
            for block in first.tensors[own].form.blocks()
        ):
            raise MergeError(
                f"{section.where}tensor {name!r} is {first.tensors[own].dtype.name} and differs between "
                f"{section.inputs[0].reference} and {each.reference}: it cannot be merged"
            )


def _by_vectors(
    recipe: Recipe, section: Section, views: Sequence[Checkpoint], forms: _Forms, progress: Progress
) -> tuple[dict[str, Piece], list[str]]:
    """The tensors of a section, merged by a method on task vectors, and notes."""
    assert section.base is not None
    dtypes = {name: forms.of([(view, name) for view in views]) for name in section.names}

    def view(number: int) -> Assembled:
        own = views[number]
        pieces = {name: taken(own, name, dtypes[name]) for name in section.names}
        return Assembled(own.name, pieces, own, own.inputs)

    base = view(section.base)
    others = [number for number in range(len(section.inputs)) if number != section.base]
    vectors = [diff(base, view(number), progress=progress) for number in others]
    merged = _with_options(
        recipe,
        vectors,
        [section.own("weight", number, 1.0) for number in others],
        [
            section.own("density", number, 1.0)
            if combined("density", section.inputs[number].scopes) is not None
            else None
            for number in others
        ],
        section.shared("lambda", 1.0),
        {key: [_first(key, section.inputs[number].scopes) for number in others] for key in _numeric(recipe)},
        [section.inputs[number].reference for number in others],
        progress,
        base,
        {name: dtype for name, dtype in dtypes.items() if dtype.name in ("F16", "BF16")},
        section.scopes,
    )
    result = Patched(base, merged)
    return {name: taken(result, name) for name in section.names}, merged.provenance["notes"]


def relative_to(start: Checkpoint, result: Result, progress: Progress = silent) -> TaskVector:
    """Return the vector from a model to a result with the same tensors, computed when it is read or saved.

    Args:
        start: The model.
        result: The result of a merge file, with a model.
        progress: Called while the model is read.

    Raises:
        UsageError: The result has other tensors, or tensors of other shapes.
    """
    model = result.model
    assert model is not None
    for name in sorted(model.tensors.keys() | start.tensors.keys()):
        one, other = (each.tensors[name].shape if name in each.tensors else None for each in (start, model))
        if one != other:
            raise UsageError(
                f"the result has tensor {name!r} as {_said(other)}, and {start.name} has it as {_said(one)}: write a "
                "model folder instead of a .lota file"
            )
    digests = hashed(start, "base", progress)
    specs = {
        name: TensorSpec(name, info.dtype, info.shape, start.tensors[name].form, base=short(digests[name]))
        for name, info in model.tensors.items()
        if info.dtype.additive
    }
    header = Header("vector", Identity(start.name, start.fingerprint), None, tensors=(), provenance=result.provenance)
    return TaskVector(header, specs.values(), _Towards(start, model, specs), model.name, start)


def _said(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


class _Towards(WidenedEntries):
    """The Source of the difference between a model and a computed one."""

    def __init__(self, start: Checkpoint, model: Assembled, specs: Mapping[str, TensorSpec]) -> None:
        super().__init__([], specs, start)
        self.inputs = inputs_of(start, model)
        self._model = model
        self._specs = specs
        self._bits = BaseBits(start)

    def change(self, name: str, start: int, stop: int, base: Bits | None = None) -> Change:
        spec = self._specs[name]
        before = (self._bits(spec) if base is None else base)[start:stop]
        return diff_range(spec.dtype, before, self._model.bits(name, start, stop))
