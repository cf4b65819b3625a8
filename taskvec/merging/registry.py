"""The merge methods by name: a row each, made of a step that prunes every vector and a function that combines them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar

from taskvec_formats import SparseTensor

from ..errors import UsageError
from .methods.breadcrumbs import outliers
from .methods.dare import drop
from .methods.disjoint import disjoint
from .methods.linear import linear
from .methods.options import Option, options_of
from .methods.pruning import Keep, pruning_options
from .methods.ties import ties
from .methods.trim import trim

ENTRY_POINTS = "taskvec.merge_methods"
Combine: TypeAlias = Callable[..., SparseTensor]


@dataclass(frozen=True)
class Method:
    """A way to merge.

    name: as on the command line. combine: Aligned entries of one range of a tensor in, its merged entries out; its
    keyword arguments are the method's options. summary: one line for people. source: where it is published.
    prune: the step before it, whose keyword arguments are options too. density: that of the step where none is asked
        for; None where it must be.
    fixed: options that are this method's own and cannot be chosen. dialects: dialect -> option -> default in it.
    whole: whether `combine` needs whole tensors rather than ranges of them.
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

    @property
    def options(self) -> dict[str, Option]:
        """Every option that can be chosen, by name; the density is none of them."""
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
        Method("disjoint", disjoint, "union of masks that do not meet", "https://arxiv.org/abs/2406.16797"),
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
    )
}

Function = TypeVar("Function", bound=Combine)


def merge_method(
    name: str, *, source: str = "", summary: str = "", whole_tensors: bool = False
) -> Callable[[Function], Function]:
    """Register a function as a merge method; a decorator.

    The function takes the vectors of one range of a tensor, side by side (`Aligned`), and returns `vectors.result(…)`;
    its keyword-only arguments are the method's options, all with defaults. Several threads or processes call it.
    whole_tensors: give it whole tensors, not ranges; more memory, but it can look at all of one.
    A package makes its methods known to the command line by an entry point of the group "taskvec.merge_methods", whose
    name is the method's and whose object is the decorated function.
    Raises UsageError for a name that is taken.
    """

    def register(function: Function) -> Function:
        if name in METHODS or name == AUTO:
            raise UsageError(f"there is a merge method {name!r} already")
        METHODS[name] = Method(name, function, summary, source, whole=whole_tensors)
        return function

    return register


AUTO = "auto"


def method_of(name: str) -> Method:
    """The method of that name, from an installed package if need be. Raises UsageError where there is none."""
    if name not in METHODS:
        from importlib.metadata import entry_points  # slow to import, and seldom needed

        for point in entry_points(group=ENTRY_POINTS, name=name):
            point.load()
    if name not in METHODS:
        raise UsageError(f"no merge method {name!r:.80}; there are {', '.join([AUTO, *METHODS])}")
    return METHODS[name]
