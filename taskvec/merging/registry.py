"""The merge methods by name: one row each, one pure function a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from taskvec_formats import SparseTensor

from .disjoint import disjoint
from .linear import linear
from .ties import ties

MergeFunction = Callable[[Sequence[SparseTensor], Sequence[float]], SparseTensor]


@dataclass(frozen=True)
class Method:
    """name: as on the command line. function: one tensor of every vector and their weights in, one tensor out.

    summary: one line for people. source: where the method is published.
    """

    name: str
    function: MergeFunction
    summary: str
    source: str


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("linear", linear, "weighted sum of the vectors", "https://arxiv.org/abs/2212.04089"),
        Method("disjoint", disjoint, "union of masks that do not meet", "https://arxiv.org/abs/2406.16797"),
        Method("ties", ties, "sign election and mean of the agreeing, no trim", "https://arxiv.org/abs/2306.01708"),
    )
}
