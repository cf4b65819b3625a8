"""Checks of the tensors of all models of a merge file before any of them is read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from taskvec_formats import Checkpoint

from ..errors import MergeError
from ..names import stack_and_layer
from ..vectors.layers import counted
from .assembled import Piece
from .recipe import Recipe
from .references import Models
from .sections import Section, is_before, is_in
from .vocabulary import Vocabulary


def check_tensors(
    recipe: Recipe, models: Models, start: Checkpoint, sections: Sequence[Section], vocabulary: Vocabulary | None
) -> None:
    """Check that all models of a merge file have the tensors of the result, and no others.

    Args:
        recipe: The merge file.
        models: Its models.
        start: The model whose config.json describes the result.
        sections: The parts of the result.
        vocabulary: The tokens of the result, or None if the models have the same rows of tokens.

    Raises:
        MergeError: A model lacks a tensor, has it in another shape, or has one that `start` does not have; or the
            result lacks one that every layer of `start` has.
        UsageError: The configuration or the tokenizer of a model does not give the rows of its tokens.
    """
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


def incomplete(
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
