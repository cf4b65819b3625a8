"""What is searched: methods, weights, densities and λ, for whole vectors or for groups of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from taskvec_formats import Checkpoint

from ..arguments import one_of
from ..errors import UsageError
from ..merging.combine import merge
from ..merging.methods.dare import drop
from ..merging.methods.dialects import DIALECTS
from ..merging.methods.trim import trim
from ..merging.registry import AUTO, Method, method_of
from ..merging.settings import Rule, Setting, described
from ..names import layer_and_module, stack_and_layer
from ..vectors.layers import counted, most, recorded
from ..vectors.vector import TaskVector

if TYPE_CHECKING:
    from optuna import Trial

METHODS = ("linear", "ties", "dare_ties", "breadcrumbs")
GROUPS = ("layer-thirds", "module")  # values of `by`
_STEP = 0.05  # of all numbers, so that recipes are short
_WEIGHT, _LAMBDA, _KEPT = (0.0, 1.5), (0.3, 1.5), (0.1, 1.0)
_GAMMA = 0.01  # of breadcrumbs: the share of the entries that are dropped as too large
# method -> why it is not searched
_UNSEARCHED = {
    AUTO: "name the methods that it chooses from",
    "average": "it is linear with other weights, and its recipe would average models instead of vectors",
}
# mergekit's names of methods, for recipes
_NAMES = {"linear": "task_arithmetic"}


@dataclass(frozen=True)
class Candidate:
    """One merge.

    Attributes:
        method: The method.
        weights: One setting per vector.
        densities: One number per vector, or None if the method does not prune.
        lam: The factor of the result.
        options: Options of the method.
        numbers: For each vector, the weight of each group of tensors.
    """

    method: str
    weights: tuple[Setting, ...]
    densities: tuple[float, ...] | None
    lam: float
    options: Mapping[str, Any]
    numbers: tuple[tuple[float, ...], ...]

    def merged(self, vectors: Sequence[TaskVector], base: Checkpoint | None = None) -> TaskVector:
        """Merge vectors lazily. The errors of `merge` are raised."""
        return merge(
            vectors,
            self.method,
            self.weights,
            density=self.densities,
            lam=self.lam,
            base=base,
            **self.options,
        )

    def recipe(self, paths: Sequence[str], base: str) -> dict[str, Any]:
        """Return the merge as the document of a recipe.

        Args:
            paths: The paths of the vectors.
            base: The path of the base.
        """
        densities = self.densities or [None] * len(paths)
        models = []
        for path, weight, density in zip(paths, self.weights, densities, strict=True):
            of_model = {"weight": described(weight), **({} if density is None else {"density": density})}
            models.append({"model": path, "parameters": of_model})
        parameters = {"lambda": self.lam, **self.options}
        name = _NAMES.get(self.method, self.method)
        return {"merge_method": name, "base_model": base, "models": models, "parameters": parameters}

    def __str__(self) -> str:
        weights = ", ".join("/".join(f"{number:g}" for number in each) for each in self.numbers)
        parts = [self.method, f"weights {weights}", *([] if self.lam == 1 else [f"λ {self.lam:g}"])]
        if self.densities is not None:
            parts.append("density " + ", ".join(f"{density:.3g}" for density in self.densities))
        return "; ".join(parts)


class Space:
    """The merges that a search chooses from.

    Args:
        vectors: The vectors to merge.
        methods: The methods to choose from.
        by: None gives each vector one weight. "layer-thirds" gives it one for each third of the layers and one for the
            tensors outside of layers; "module" gives it one for each module, such as "self_attn.q_proj".

    Raises:
        UsageError: There are fewer than two vectors, a method or grouping is unknown, or a method needs other options.
    """

    def __init__(self, vectors: Sequence[TaskVector], methods: Sequence[str] = METHODS, by: str | None = None) -> None:
        if len(vectors) < 2:
            raise UsageError(f"a search needs at least two vectors, found {len(vectors)}")
        if by is not None:
            one_of("`by`", by, GROUPS)
        if isinstance(methods, str) or not methods:
            raise UsageError(f"a search needs a list of methods, at least one, found {methods!r}")
        for method in methods:
            if method in _UNSEARCHED:
                raise UsageError(f"the method {method} is not searched: {_UNSEARCHED[method]}")
        self.methods = tuple(dict.fromkeys(methods))
        for method in self.methods:
            method_of(method)
        entries = [_entries(vector) for vector in vectors]
        self._own = [sum(each.values()) / max(v.eligible, 1) for v, each in zip(vectors, entries, strict=True)]
        self._densest = [
            max((count / max(vector.specs[name].size, 1) for name, count in each.items()), default=0.0)
            for vector, each in zip(vectors, entries, strict=True)
        ]
        self.groups = {} if by is None else _groups(vectors, by)

    @property
    def plain(self) -> dict[str, Any]:
        """The parameters of plain TIES, or of the first method if TIES is not searched: weights 1, nothing pruned."""
        method = "ties" if "ties" in self.methods else self.methods[0]
        weights = {name: 1.0 for number in range(len(self._own)) for name in self._weight_names(number)}
        numbers = {"kept": 1.0} if method_of(method).prune is not None else {}
        return {"method": method, **weights, "lambda": 1.0, **numbers}

    def suggest(self, trial: Trial) -> Candidate:
        """Choose a merge.

        Args:
            trial: The trial of Optuna that chooses the numbers.
        """
        method = trial.suggest_categorical("method", self.methods)
        numbers = [
            tuple(_number(trial, name, *_WEIGHT) for name in self._weight_names(number))
            for number in range(len(self._own))
        ]
        weights = tuple(map(self._setting, numbers))
        lam = _number(trial, "lambda", *_LAMBDA)
        known = method_of(method)
        # recipes have other defaults
        options: dict[str, Any] = {
            name: value for name, value in (("dialect", "reference"), ("seed", 0)) if name in known.options
        }
        densities = None
        if known.prune is not None:
            kept = _number(trial, "kept", *_KEPT)
            # rounded up, so that with all entries kept none is lost to the rounding of a product
            densities = tuple(min(1.0, float(f"{kept * own * (1 + 1e-9):.12g}")) for own in self._densities(known))
            if "gamma" in known.options:
                options["gamma"] = float(f"{_GAMMA * min(self._densest):.6g}")
        return Candidate(method, weights, densities, lam, options, tuple(numbers))

    def _densities(self, method: Method) -> Sequence[float]:
        """Return the density of each vector at which the method keeps all entries."""
        if method.prune is drop:  # which is given the share of the entries
            return [1.0] * len(self._own)
        rules = DIALECTS[method.fixed.get("dialect", "reference")]
        return self._own if method.prune is trim and rules.whole_vector else self._densest

    def _weight_names(self, number: int) -> list[str]:
        return [f"weight {number + 1}{f' of {group}' if group else ''}" for group in self.groups or [""]]

    def _setting(self, values: Sequence[float]) -> Setting:
        if not self.groups:
            return values[0]
        pairs = zip(values, self.groups.values(), strict=True)
        return [Rule(value, each) for value, filters in pairs for each in filters]


def _entries(vector: TaskVector) -> dict[str, int]:
    """Return the number of entries of each tensor, which a lazy vector computes."""
    return {name: spec.entries if vector.is_stored else len(vector[name]) for name, spec in vector.specs.items()}


def _number(trial: Trial, name: str, low: float, high: float) -> float:
    return round(trial.suggest_float(name, low, high, step=_STEP), 2)


def _groups(vectors: Sequence[TaskVector], by: str) -> dict[str, list[str | None]]:
    """Group name -> filters of `Rule`, which match the tensors of the group. A last group has the other tensors."""
    names = {name for vector in vectors for name in vector.specs}
    found: dict[str, list[str | None]] = {}
    if by == "module":
        filters: dict[str, str] = {}
        for name in sorted(names):
            if stack_and_layer(name) is not None:
                # a filter cannot skip the number of an expert, so all modules of the experts are one group
                module, _, rest = layer_and_module(name)[1].partition(".*")
                filters[module] = f".{module}." if rest else name[name.rindex(f".{module}") :]
        # the first filter that a name contains applies, so the most specific one comes first
        found = {module: [text] for module, text in sorted(filters.items(), key=lambda item: -len(item[1]))}
    else:
        counts = most([counted(names), *(recorded(vector.provenance) for vector in vectors)])
        for stack, layers in sorted(counts.items()):
            for layer in range(layers):
                third = ("first", "second", "last")[min(3 * layer // layers, 2)]
                found.setdefault(f"{third} third", []).append(f"{stack}.{layer}.")
    if not found:
        raise UsageError(f"`by={by}` needs tensors inside transformer blocks, and the vectors change none")
    if _others(names, found.values()):
        found["other tensors"] = [None]
    return found


def _others(names: Iterable[str], groups: Iterable[Sequence[str | None]]) -> bool:
    filters = [each for group in groups for each in group if each]
    return any(not any(each in name for each in filters) for name in names)
