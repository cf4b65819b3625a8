"""The registry of merge methods: a function that combines vectors and, optionally, one that prunes them first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from taskvec_formats import SparseTensor

from ..arguments import shown
from ..errors import UsageError
from .methods.breadcrumbs import outliers
from .methods.dare import drop
from .methods.della import magprune
from .methods.disjoint import disjoint
from .methods.linear import linear
from .methods.nearswap import nearswap
from .methods.options import Option, options_of
from .methods.pruning import Keep, pruning_options
from .methods.ram import ram, ramplus_tl
from .methods.sce import sce
from .methods.spherical import model_stock, multislerp, nuslerp
from .methods.ties import ties
from .methods.trim import trim

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINTS = "taskvec.merge_methods"
AUTO = "auto"
RESERVED = ("vectors", "method", "weights", "progress", "density", "lam", "base", "device")  # arguments of `merge`
Combine: TypeAlias = Callable[..., SparseTensor]


@dataclass(frozen=True)
class Method:
    """A merge method.

    Attributes:
        name: The name, as on the command line.
        combine: A function from the aligned entries of one range of a tensor (`Aligned`) to the merged entries. Its
            keyword-only arguments are options of the method.
        summary: One line that describes the method.
        source: The URL of its publication.
        prune: A function that selects the entries to keep of each vector before they are combined, or None. Its
            keyword-only arguments are options too.
        density: The density of the pruning step if none is given. None if a density is required.
        rescale: The default of the option `rescale`. None takes the dialect's.
        fixed: Options that have a fixed value in this method and cannot be given.
        dialects: Dialect -> option -> its default in this dialect.
        whole: Whether `combine` needs whole tensors instead of ranges.
        weighs: Whether the weights of the vectors have an effect.
        count: The numbers of vectors that can be merged, the smallest and the largest; the latter may be None.
    """

    name: str
    combine: Combine
    summary: str
    source: str
    prune: Callable[..., Keep] | None = None
    density: float | None = None
    rescale: str | None = "none"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    dialects: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    whole: bool = False
    weighs: bool = True
    count: tuple[int, int | None] = (1, None)

    @property
    def options(self) -> dict[str, Option]:
        """All options that can be given, by name. The density is not one of them."""
        found = options_of(self.combine)
        if self.prune:
            found |= options_of(pruning_options) | options_of(self.prune)
            found["rescale"] = replace(found["rescale"], default=self.rescale)
        return {name: option for name, option in found.items() if name not in self.fixed}


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("linear", linear, "weighted sum: task arithmetic", "https://arxiv.org/abs/2212.04089"),
        Method(
            "average",
            linear,
            "weighted sum over the sum of the weights",
            "https://arxiv.org/abs/2203.05482",
            fixed={"normalize": True},
        ),
        Method("disjoint", disjoint, "union of disjoint masks", "https://arxiv.org/abs/2406.16797"),
        Method(
            "ties",
            ties,
            "trim, elect signs, mean of those that agree",
            "https://arxiv.org/abs/2306.01708",
            prune=trim,
            density=1.0,
        ),
        Method(
            "magnitude_prune",
            linear,
            "trim each tensor, then weighted sum",
            "https://huggingface.co/docs/peft/developer_guides/model_merging",
            prune=trim,
            fixed={"dialect": "peft"},
        ),
        Method(
            "dare_linear",
            linear,
            "drop at random, rescale, weighted sum",
            "https://arxiv.org/abs/2311.03099",
            prune=drop,
            rescale=None,
        ),
        Method(
            "dare_ties",
            ties,
            "drop at random, rescale, elect signs, mean of those that agree",
            "https://arxiv.org/abs/2311.03099",
            prune=drop,
            rescale=None,
            dialects={"mergekit": {"normalize": False}},
        ),
        Method(
            "breadcrumbs",
            linear,
            "leave out the largest and the small changes, weighted sum",
            "https://arxiv.org/abs/2312.06795",
            prune=outliers,
        ),
        Method(
            "breadcrumbs_ties",
            ties,
            "leave out the largest and the small changes, elect signs, mean of those that agree",
            "https://arxiv.org/abs/2312.06795",
            prune=outliers,
            dialects={"mergekit": {"normalize": False}},
        ),
        Method(
            "della_linear",
            linear,
            "drop small changes more often than large ones, rescale, weighted sum",
            "https://arxiv.org/abs/2406.11617",
            prune=magprune,
            rescale=None,
        ),
        Method(
            "della",
            ties,
            "drop small changes more often than large ones, rescale, elect signs, mean of those that agree",
            "https://arxiv.org/abs/2406.11617",
            prune=magprune,
            rescale=None,
        ),
        Method(
            "sce",
            sce,
            "select the positions that vary most, weigh by size, elect signs",
            "https://arxiv.org/abs/2408.07990",
            whole=True,
            weighs=False,
        ),
        Method(
            "ram",
            ram,
            "keep single changes, average shared ones",
            "https://arxiv.org/abs/2601.13572",
            weighs=False,
        ),
        Method(
            "ramplus_tl",
            ramplus_tl,
            "scale single changes up, average shared ones",
            "https://arxiv.org/abs/2601.13572",
            whole=True,
            weighs=False,
        ),
        Method(
            "model_stock",
            model_stock,
            "mean, scaled by the agreement of the directions",
            "https://arxiv.org/abs/2403.19522",
            whole=True,
            weighs=False,
            count=(2, None),
        ),
        Method(
            "nuslerp",
            nuslerp,
            "spherical interpolation of two vectors",
            "https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
            whole=True,
            count=(2, 2),
        ),
        Method(
            "multislerp",
            multislerp,
            "barycentric interpolation on a sphere",
            "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
            whole=True,
        ),
        Method(
            "nearswap",
            nearswap,
            "a change of limited magnitude",
            "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
            weighs=False,
            count=(1, 1),
        ),
    )
}

BUILT_IN = frozenset(METHODS)
Function = TypeVar("Function", bound=Combine)


def merge_method(
    name: str, *, source: str = "", summary: str = "", whole_tensors: bool = False
) -> Callable[[Function], Function]:
    """Register a function as a merge method. Used as a decorator.

    The function takes the vectors of one range of a tensor (`Aligned`) and returns `vectors.result(…)`. It is called
    from several threads or processes. It computes on numpy arrays, or on torch tensors if `merge` is given a device.
    Its keyword-only arguments are the options of the method. They must have defaults, and none may have the name of an
    argument of `merge`.

    If a function of the same module and qualified name is registered again, as by importlib.reload, it replaces the
    earlier one. A package makes its methods available to the command line with an entry point of the group
    "taskvec.merge_methods", whose name is the name of the method and whose object is the decorated function.

    Args:
        name: The name of the method.
        source: The URL of its publication.
        summary: One line that describes the method.
        whole_tensors: Whether to pass whole tensors instead of ranges. This takes more memory.

    Returns:
        A decorator that registers the function and returns it unchanged.

    Raises:
        UsageError: The name is not a string. When the decorator is applied: another function is registered under this
            name, or an option has no default or the name of an argument of `merge`.
    """
    if not isinstance(name, str):
        raise UsageError(
            f'merge_method needs the name of the method, as in @merge_method("median"), found {shown(name)}'
        )

    def register(function: Function) -> Function:
        known = METHODS.get(name)
        if name == AUTO or name in BUILT_IN or (known and _identity(known.combine) != _identity(function)):
            raise UsageError(f"a merge method {name!r} is already registered")
        _check_options(name, function)
        METHODS[name] = Method(name, function, summary, source, whole=whole_tensors)
        return function

    return register


def _identity(function: Combine) -> object:
    """What a function keeps if its module is loaded again, or its cell of a notebook is run again."""
    return (function.__module__, function.__qualname__) if inspect.isfunction(function) else function


def _check_options(name: str, function: Combine) -> None:
    """Check the options that the function of a merge method declares."""
    try:
        options = options_of(function)
    except UsageError as error:
        raise UsageError(f"the merge method {name!r}: {error}") from None
    for option in options:
        if option in RESERVED:
            raise UsageError(
                f"the merge method {name!r}: an option cannot have the name `{option}`, which is an argument of merge"
            )


def method_of(name: str) -> Method:
    """Look up a merge method, and load it from an installed package if necessary.

    Args:
        name: The name of the method.

    Raises:
        UsageError: There is no such method, or the entry point of its package cannot be loaded.
    """
    if name not in METHODS:
        from importlib.metadata import entry_points  # slow to import and rarely needed

        for point in entry_points(group=ENTRY_POINTS, name=name):
            _load(point)
    if name not in METHODS:
        raise UsageError(f"no merge method {name!r:.80}; the methods are {', '.join([AUTO, *METHODS])}")
    return METHODS[name]


def _load(point: EntryPoint) -> None:
    """Load an entry point, whose module registers a merge method of the same name."""
    what = f"the entry point '{point.name} = {point.value}' of the group {ENTRY_POINTS}"
    try:
        point.load()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{what} cannot be loaded: {error}") from error
    if point.name not in METHODS:
        raise UsageError(f"{what} does not register a merge method {point.name!r}")
