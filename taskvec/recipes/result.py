"""The result of a merge file: a task vector relative to the base, or a model that is computed tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from taskvec_formats import Checkpoint, Form

from ..applying.overlay import Patched
from ..errors import MergeError
from ..reporting.progress import Progress, silent
from ..vectors.diff import diff
from ..vectors.lineage import joined
from ..vectors.source import inputs_of
from ..vectors.vector import TaskVector
from .assembled import Assembled, Piece, taken
from .changes import Changes
from .checks import check_tensors, incomplete
from .dtypes import Forms
from .methods.engine import Computed, WholeTensor
from .methods.table import WholeMethod
from .parameters import combined
from .recipe import Recipe
from .references import Models
from .sections import Section, sections_of
from .vectors import Given, first_given, merge_with, merged_onto, merged_vectors, numeric_options
from .vocabulary import Vocabulary


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
        vector = merged_vectors(recipe, progress)
        return Result(vector.provenance, vector)
    forms = Forms(recipe, models, start, within)
    is_one = [module.name for module in recipe.modules] == [None]
    if isinstance(method, WholeMethod) or recipe.has_slices or not is_one:
        sections = sections_of(recipe, models, start)
        return _assembled(recipe, models, start, sections, forms, Changes(recipe, models, start), progress)
    changes = Changes(recipe, models, start)
    if changes.vocabulary is not None or changes.removed or not forms.keeps(dtype):
        return _assembled(recipe, models, start, sections_of(recipe, models, start), forms, changes, progress)
    vector = merged_onto(recipe, models, start, forms, progress)
    vector.provenance["notes"] += changes.notes
    return Result(vector.provenance, vector, files=changes.files)


def _assembled(
    recipe: Recipe,
    models: Models,
    start: Checkpoint,
    sections: Sequence[Section],
    forms: Forms,
    changes: Changes,
    progress: Progress,
) -> Result:
    """The result as a model, section by section."""
    pieces: dict[str, Piece] = {}
    notes = [*recipe.notes, *changes.notes]
    check_tensors(recipe, models, start, sections, changes.vocabulary)
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
    notes += incomplete(recipe, sections, start, pieces)
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


def _views(section: Section, models: Models, forms: Forms, vocabulary: Vocabulary | None) -> list[Checkpoint]:
    """The models of a section, with the names and the tokens of the result."""
    pieces: list[dict[str, Piece]] = [{} for _ in section.inputs]
    for name in section.names:
        inputs = [(models[each.reference].checkpoint, each.names[name]) for each in section.inputs]
        own = [(each.reference, each.names[name]) for each in section.inputs]
        if vocabulary is not None and any(vocabulary.owner(reference).has_rows(other) for reference, other in own):
            base = None if section.base is None else section.inputs[section.base].reference
            found = vocabulary.mapped(own, base, forms.of(inputs))
        else:
            found = [taken(*each) for each in inputs]
        for held, piece in zip(pieces, found, strict=True):
            held[name] = piece
    checkpoints = [models[each.reference].checkpoint for each in section.inputs]
    return [
        Assembled(checkpoint.name, held, checkpoint, checkpoint.inputs)
        for checkpoint, held in zip(checkpoints, pieces, strict=True)
    ]


def _by_function(method: WholeMethod, section: Section, views: Sequence[Checkpoint], forms: Forms) -> dict[str, Piece]:
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
    recipe: Recipe, section: Section, views: Sequence[Checkpoint], forms: Forms, progress: Progress
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
    own = [section.inputs[number] for number in others]
    given = Given(
        [each.reference for each in own],
        [section.own("weight", number, 1.0) for number in others],
        [
            None if combined("density", each.scopes) is None else section.own("density", number, 1.0)
            for number, each in zip(others, own, strict=True)
        ],
        section.shared("lambda", 1.0),
        {key: [first_given(key, each.scopes) for each in own] for key in numeric_options(recipe)},
        section.scopes,
    )
    narrow = {name: dtype for name, dtype in dtypes.items() if dtype.name in ("F16", "BF16")}
    merged = merge_with(recipe, vectors, given, base, narrow, progress)
    result = Patched(base, merged)
    return {name: taken(result, name) for name in section.names}, merged.provenance["notes"]
