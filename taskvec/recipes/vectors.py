"""Merges of task vectors with the parameters of a merge file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

from taskvec_formats import Checkpoint, Header, Identity
from taskvec_formats.dtypes import DType

from ..arguments import shown
from ..errors import UsageError
from ..merging.combine import merge
from ..merging.methods.options import Option
from ..merging.narrow import in_dtypes
from ..merging.registry import AUTO, method_of
from ..merging.settings import Setting, described
from ..reporting.progress import Progress
from ..vectors.diff import diff
from ..vectors.found import is_vector
from ..vectors.promotion import wider
from ..vectors.source import Memory
from ..vectors.vector import TaskVector
from .assembled import Assembled, taken
from .dtypes import Forms
from .methods.table import WholeMethod
from .parameters import SETTINGS, combined, with_default
from .recipe import Recipe, Source, Tokenizer
from .references import Models

_MISSING = object()


@dataclass(frozen=True)
class Given:
    """The parameters of a merge of task vectors, as a merge file gives them.

    Attributes:
        references: The models, in the order of the vectors.
        weights: One weight per vector.
        densities: One density per vector, or None where none is given.
        lam: λ, a factor of the result.
        numbers: Option of the method that is a number -> the value for each model (`first_given`).
        shared: The parameters that apply to all models, those of the highest precedence first.
    """

    references: Sequence[str]
    weights: Sequence[Setting]
    densities: Sequence[Setting | None]
    lam: Setting
    numbers: Mapping[str, Sequence[Any]]
    shared: Sequence[Mapping[str, Any]]


def merged_vectors(recipe: Recipe, progress: Progress) -> TaskVector:
    """The merge of task vectors without a base.

    Raises:
        UsageError: The file asks for something that needs a base.
        The errors of `merge` are raised too.
    """
    if isinstance(recipe.method, WholeMethod):
        _check_whole(recipe, recipe.method)
    if recipe.has_slices:
        raise UsageError("slices need base_model, or models that are checkpoints")
    if [module.name for module in recipe.modules] != [None]:
        raise UsageError("modules need base_model, or models that are checkpoints")
    if recipe.tokenizer not in (None, Tokenizer("base")):
        raise UsageError("a tokenizer needs base_model, whose embeddings get its tokens")
    vectors = [_opened(each.model) for module in recipe.modules for each in module.models]
    return _merge(recipe, vectors, progress, None)


def _check_whole(recipe: Recipe, method: WholeMethod) -> None:
    """Refuse a method on whole models that is not defined, or not with these parameters, for task vectors alone."""
    try:
        known = method_of(method.title).options
    except UsageError:
        raise UsageError(f"{method.name} merges whole models: base_model must name the base of the vectors") from None
    if method.name == "linear" and recipe.parameters.get("normalize") is False:
        raise UsageError("a linear merge without normalize would scale the base: use task_arithmetic")
    for scope in (recipe.parameters, *(each.parameters for each in recipe.sources)):
        for name, value in scope.items():
            if name not in SETTINGS and name not in known and value != method.parameters[name].default:
                raise UsageError(f"{name} needs base_model: without it, {method.name} merges task vectors")


def _opened(reference: str) -> TaskVector:
    if not is_vector(reference):
        raise UsageError(f"{reference} is a checkpoint: base_model must name its base")
    return TaskVector.open(reference)


def merged_onto(recipe: Recipe, models: Models, start: Checkpoint, forms: Forms, progress: Progress) -> TaskVector:
    """The merge of task vectors relative to a base."""
    narrow = forms.narrow()
    return _merge(
        recipe,
        [_relative(models, each.model, start, narrow, progress) for each in _merged_sources(recipe)],
        progress,
        start,
        narrow,
    )


def _merged_sources(recipe: Recipe) -> list[Source]:
    """The models that are merged, without the base."""
    found = [each for module in recipe.modules for each in module.models if each.model != recipe.base]
    if not found:
        raise UsageError("nothing to merge: 'models' lists only base_model")
    return found


def _relative(
    models: Models, reference: str, start: Checkpoint, narrow: Mapping[str, DType], progress: Progress
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
    given = Given(
        [each.model for each in sources],
        [with_default(combined("weight", each), 1.0) for each in scopes],
        [combined("density", each) for each in scopes],
        with_default(combined("lambda", scopes[0][1:]), 1.0),
        {name: [first_given(name, each) for each in scopes] for name in numeric_options(recipe)},
        scopes[0][1:],
    )
    return merge_with(recipe, vectors, given, base, narrow, progress)


def first_given(name: str, scopes: Sequence[Mapping[str, Any]]) -> Any:
    """The value of an option in the first scope that has it, which may be None."""
    return next((scope[name] for scope in scopes if name in scope), _MISSING)


def numeric_options(recipe: Recipe) -> list[str]:
    """The options of a method on task vectors that are numbers."""
    known = _known(recipe)
    return [name for name, option in known.items() if option.kind is float]


def _known(recipe: Recipe) -> Mapping[str, Option]:
    name = _name(recipe)
    return {} if name == AUTO else method_of(name).options


def _name(recipe: Recipe) -> str:
    method = recipe.method
    return method.title if isinstance(method, WholeMethod) else method


def merge_with(
    recipe: Recipe,
    vectors: Sequence[TaskVector],
    given: Given,
    base: Checkpoint | None,
    narrow: Mapping[str, DType] | None,
    progress: Progress,
) -> TaskVector:
    """Merge vectors with the parameters of a merge file.

    Args:
        recipe: The merge file.
        vectors: The vectors.
        given: The parameters.
        base: The base of the vectors, or None.
        narrow: Tensor name -> F16 or BF16, in which it is computed; other tensors are computed in f32.
        progress: Called while masks are compared.

    Raises:
        UsageError: The parameters are inconsistent. The other errors of `merge` are raised too.
    """
    name, known = _name(recipe), _known(recipe)
    every: dict[str, Any] = {}
    for scope in reversed(given.shared):
        every |= scope
    options = {key: value for key, value in every.items() if key not in SETTINGS and (key in known or name == AUTO)}
    if "dialect" in known:
        options.setdefault("dialect", "mergekit")
    if "rescale" in options:
        options["rescale"] = "norm" if options["rescale"] else "none"
    for key, values in given.numbers.items():
        if any(value is not _MISSING for value in values):
            options[key] = _one_number(known[key], values, given.references)
    prunes = name != AUTO and method_of(name).prune is not None
    asked = any(each is not None for each in given.densities)
    weighs = name == AUTO or method_of(name).weighs
    merged = merge(
        [in_dtypes(vector, narrow) for vector in vectors] if narrow else vectors,
        name,
        given.weights if weighs else None,
        progress,
        density=[with_default(each, 1.0) for each in given.densities] if asked or prunes else None,
        lam=given.lam,
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
