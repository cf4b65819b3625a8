"""The parts of the result of a merge file: which tensors of which models are merged, with which parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taskvec_formats import Checkpoint

from ..arguments import shown
from ..errors import MergeError, UsageError
from ..merging.settings import Depth, Resolved, resolve
from ..names import stack_and_layer
from ..vectors.layers import counted
from .methods.table import REQUIRED, WholeMethod
from .parameters import combined
from .recipe import Module, Recipe, Slice, Source
from .references import Models

# parts of the names of tensors before the layers of a model; the others follow the layers
_BEFORE = ("embed", "wte", "wpe", "emb.")


@dataclass(frozen=True)
class Input:
    """A model of a section.

    Attributes:
        reference: The model.
        scopes: The parameters that apply to it, those of the highest precedence first.
        names: Tensor of the result -> tensor of the model.
    """

    reference: str
    scopes: Sequence[Mapping[str, Any]]
    names: Mapping[str, str]


@dataclass(frozen=True)
class Section:
    """Tensors of the result that are merged from the same models with the same parameters.

    Attributes:
        names: The tensors of the result.
        inputs: The models, in the order in which they are added.
        base: The index of the base among the inputs, or None.
        scopes: The parameters that apply to all models, those of the highest precedence first.
        depth: Tensor of the result -> its depth, at which gradients are read.
        where: The part of the file, as in "slice 2: ", for errors.
        is_partial: Whether not all sources have the tensor. If only one of them has it, it is not merged.
    """

    names: Sequence[str]
    inputs: Sequence[Input]
    base: int | None
    scopes: Sequence[Mapping[str, Any]]
    depth: Callable[[str], float]
    where: str
    is_partial: bool = False

    def shared(self, name: str, default: Any = None) -> Any:
        """A parameter of all models.

        Args:
            name: The parameter.
            default: Its value for tensors for which none is given.
        """
        return self._resolved(name, self.scopes, {each: each for each in self.names}, default)

    def own(self, name: str, number: int, default: Any = None) -> Any:
        """A parameter of one model. Rules are compared with the names of the tensors in that model.

        Args:
            name: The parameter.
            number: The index of the model among the inputs.
            default: As in `shared`.
        """
        each = self.inputs[number]
        return self._resolved(name, each.scopes, each.names, default)

    def _resolved(self, name: str, scopes: Sequence[Mapping[str, Any]], names: Mapping[str, str], default: Any) -> Any:
        setting = combined(name, scopes)
        if setting is None or isinstance(setting, (bool, int, float, str)):
            return default if setting is None else setting
        found = {each: resolve(setting, names[each], self.depth(each)) for each in self.names}
        filled = {each: default if number is None else number for each, number in found.items()}
        return Resolved({each: number for each, number in filled.items() if number is not None}, setting)

    def numbers(self, method: WholeMethod, tensor: str) -> dict[str, Any]:
        """The parameters of a method on whole models for one tensor.

        Args:
            method: The method.
            tensor: The tensor of the result.

        Returns:
            Name -> value for all models, or a list with one value per model.

        Raises:
            UsageError: A parameter that must be given is missing.
        """
        found: dict[str, Any] = {}
        for name, parameter in method.parameters.items():
            if parameter.scope == "all":
                given = [(self.scopes, tensor)]
            else:
                given = [(each.scopes, each.names[tensor]) for each in self.inputs]
            values = [self._number(name, scopes, own, tensor) for scopes, own in given]
            if None in values and parameter.default is REQUIRED:
                raise UsageError(f"{self.where}{method.name} needs {name} for tensor {tensor!r}")
            values = [parameter.default if value is None else value for value in values]
            found[name] = values[0] if parameter.scope == "all" else values
        return found

    def _number(self, name: str, scopes: Sequence[Mapping[str, Any]], own: str, tensor: str) -> Any:
        """A parameter of one tensor of the result, which is called `own` where the parameter applies."""
        setting = combined(name, scopes)
        return setting if setting is None or isinstance(setting, bool) else resolve(setting, own, self.depth(tensor))


def sections_of(recipe: Recipe, models: Models, start: Checkpoint) -> list[Section]:
    """Divide the result of a merge file into sections.

    Args:
        recipe: The merge file.
        models: Its models.
        start: The model that gives the names of the tensors.

    Raises:
        UsageError: A module does not exist, a layer does not exist, or a slice lacks its base.
        MergeError: A model lacks a tensor.
    """
    parts = _by_module(recipe.modules, list(start.tensors))
    found: list[Section] = []
    for module, names in parts:
        if module.slices:
            found += _sliced(recipe, module, names, models)
        else:
            found.append(_whole(recipe, module, names, Depth(start.tensors)))
    return found


def _by_module(modules: Sequence[Module], names: Sequence[str]) -> list[tuple[Module, list[str]]]:
    """Divide the tensors among the modules. The module "default" has those that are in no other one."""
    if [module.name for module in modules] == [None]:
        return [(modules[0], list(names))]
    taken: dict[str, str] = {}
    for module in modules:
        for name in names:
            if (
                module.name != "default"
                and is_in(module.name, name)
                and taken.setdefault(name, str(module.name)) != module.name
            ):
                raise UsageError(f"tensor {name!r} is in both module {taken[name]!r} and module {module.name!r}")
    found = []
    for module in modules:
        own = [name for name in names if taken.get(name, "default") == module.name]
        if not own:
            known = sorted({part for name in names for part in _prefix(name)})
            raise UsageError(
                f"there is no module {shown(module.name)}: a module is default, or a part of the names of tensors "
                f"before the number of a layer, such as {', '.join(known[:12])}"
            )
        found.append((module, own))
    given = {name for _, own in found for name in own}
    if left := [name for name in names if name not in given]:
        raise UsageError(f"tensor {left[0]!r} is in none of the modules: add the module default for all other tensors")
    return found


def is_in(module: str | None, name: str) -> bool:
    """Whether a tensor may be in a module: one that its name contains, or the module for all others."""
    return module in (None, "default", *_prefix(name))


def is_before(name: str) -> bool:
    """Whether a tensor outside of the layers comes before them: the first slice gives it, not the last one."""
    return any(part in name for part in _BEFORE)


def _prefix(name: str) -> list[str]:
    """The parts of the name of a tensor before the number of its layer, or before its last part."""
    place = stack_and_layer(name)
    return (place[0] if place else name.rpartition(".")[0]).split(".")


def _whole(recipe: Recipe, module: Module, names: Sequence[str], depth: Depth) -> Section:
    shared = [module.parameters, recipe.parameters]
    same = {name: name for name in names}
    inputs = [Input(source.model, [source.parameters, *shared], same) for source in module.models]
    listed = [each.reference for each in inputs]
    base = recipe.base
    if base is not None and base not in listed:
        averaged = isinstance(recipe.method, WholeMethod) and recipe.method.base == "ignored"
        # mergekit averages the base too if `parameters` give a weight to all models
        if not averaged or any("weight" in scope for scope in shared):
            inputs.append(Input(base, shared, same))
            listed.append(base)
    repeated = next((each for each in listed if listed.count(each) > 1), None)
    if repeated is not None and isinstance(recipe.method, WholeMethod) and recipe.method.name != "linear":
        raise UsageError(f"{repeated} is listed twice")
    where = "" if module.name is None else f"module {module.name}: "
    return Section(names, inputs, listed.index(base) if base in listed else None, shared, depth, where)


def _sliced(recipe: Recipe, module: Module, names: Sequence[str], models: Models) -> list[Section]:
    own = "" if module.name is None else f"module {module.name}: "
    stacks = counted(names)
    if len(stacks) != 1:
        said = ", ".join(sorted(stacks)) or "none"
        raise UsageError(f"{own}slices need one stack of layers, found {said}: name one as a module under 'modules'")
    stack = next(iter(stacks))
    outside = [name for name in names if stack_and_layer(name) is None]
    before = [name for name in outside if is_before(name)]
    after = [name for name in outside if name not in before]
    found: list[Section] = []
    first = 0
    for number, each in enumerate(module.slices, 1):
        where = f"{own}slice {number}: "
        shared = [each.parameters, module.parameters, recipe.parameters]
        for reader, edge in ((before, number == 1), (after, number == len(module.slices))):
            if edge and reader:
                found.append(
                    _section(
                        recipe,
                        each,
                        shared,
                        [{name: name for name in reader}] * len(each.sources),
                        lambda name: 0.0,
                        where,
                    )
                )
        renamed = [_renamed(source, stack, first, models, where) for source in each.sources]
        count = _length(each)
        depth = _Layers(stack, first, count)
        every = set.intersection(*(set(names_of) for names_of in renamed))
        common = [{name: own for name, own in names_of.items() if name in every} for names_of in renamed]
        found.append(_section(recipe, each, shared, common, depth, where))
        for name in sorted({name for names_of in renamed for name in names_of} - every):
            having = [number for number, names_of in enumerate(renamed) if name in names_of]
            found.append(_partial(recipe, each, shared, having, [renamed[n] for n in having], name, depth, where))
        first += count
    return found


def _partial(
    recipe: Recipe,
    each: Slice,
    shared: Sequence[Mapping[str, Any]],
    having: Sequence[int],
    names: Sequence[Mapping[str, str]],
    name: str,
    depth: Callable[[str], float],
    where: str,
) -> Section:
    """A tensor that only some sources of a slice have: the average of those, or that of the only one."""
    averages = isinstance(recipe.method, WholeMethod) and recipe.method.name == "linear"
    if not averages and len(having) > 1:
        lacking = next(source.model for number, source in enumerate(each.sources) if number not in having)
        raise MergeError(f"{where}{lacking} lacks tensor {name!r}, which other sources have")
    own = [{name: names_of[name]} for names_of in names]
    sources = [each.sources[number] for number in having]
    inputs = [Input(source.model, [source.parameters, *shared], of) for source, of in zip(sources, own, strict=True)]
    return Section([name], inputs, None, shared, depth, where, is_partial=True)


def _length(each: Slice) -> int:
    layers = each.sources[0].layers
    assert layers is not None
    return layers[1] - layers[0]


class _Layers:
    """The depth of each tensor in its slice."""

    def __init__(self, stack: str, first: int, count: int) -> None:
        self._stack, self._first, self._count = stack, first, count

    def __call__(self, name: str) -> float:
        place = stack_and_layer(name)
        assert place is not None
        return (place[1] - self._first) / (self._count - 1) if self._count > 1 else 1.0


def _renamed(source: Source, stack: str, first: int, models: Models, where: str) -> dict[str, str]:
    """Tensor of the result -> tensor of a model, for the layers that a slice takes from it."""
    tensors = models[source.model].checkpoint.tensors
    assert source.layers is not None
    low, high = source.layers
    layers = counted(tensors).get(stack, 0)
    if high > layers:
        raise UsageError(f"{where}{source.model} has {layers} layers in {stack}, so layer_range cannot end at {high}")
    found = {}
    for name in tensors:
        place = stack_and_layer(name)
        if place is not None and place[0] == stack and low <= place[1] < high:
            rest = name[len(f"{stack}.{place[1]}") :]
            found[f"{stack}.{first + place[1] - low}{rest}"] = name
    return found


def _section(
    recipe: Recipe,
    each: Slice,
    shared: Sequence[Mapping[str, Any]],
    names: Sequence[Mapping[str, str]],
    depth: Callable[[str], float],
    where: str,
) -> Section:
    inputs = [
        Input(source.model, [source.parameters, *shared], own) for source, own in zip(each.sources, names, strict=True)
    ]
    base = recipe.base if each.base is None else each.base
    at = next((i for i, source in enumerate(each.sources) if source.model == base), None)
    needs = not isinstance(recipe.method, WholeMethod) or recipe.method.base == "required"
    if at is None and needs:
        raise UsageError(f"{where}{recipe.named} needs base_model among the sources of the slice, with its layer_range")
    return Section(list(names[0]), inputs, at, shared, depth, where)
