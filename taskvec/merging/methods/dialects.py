"""What programs that merge mean by one name. They agree on the idea and differ in numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

DialectName: TypeAlias = Literal["reference", "mergekit", "peft"]


@dataclass(frozen=True)
class Dialect:
    """How one program does what the papers leave open, or otherwise than they say.

    whole_vector: whether the largest entries are sought in the whole vector, or in each tensor by itself.
    entries: how many entries a density leaves of so many weights.
    weighted_election: whether weights count when signs are elected.
    zero_is_positive: whether the positive sign is elected where masses cancel; else none is, and the entry is dropped.
    by_weight: whether a mean is divided by the weights of those that agree; else by their number.
    rescale: after entries were dropped at random, by what the others grow: "density", 1/density; "norm", so that the
        sum of magnitudes of each tensor stays.
    """

    whole_vector: bool
    entries: Callable[[float, int], int]
    weighted_election: bool
    zero_is_positive: bool
    by_weight: bool
    rescale: str


DIALECTS: dict[DialectName, Dialect] = {
    # the papers: arXiv 2306.01708, Algorithm 1; arXiv 2311.03099, section 3
    "reference": Dialect(
        whole_vector=True,
        entries=lambda density, size: round(density * size),
        weighted_election=True,
        zero_is_positive=False,
        by_weight=False,
        rescale="density",
    ),
    # mergekit 0.1.5, generalized_task_arithmetic
    "mergekit": Dialect(
        whole_vector=False,
        entries=lambda density, size: max(1, int(density * size)) if density > 0 and size else 0,
        weighted_election=True,
        zero_is_positive=True,
        by_weight=True,
        rescale="norm",
    ),
    # peft 0.21, utils.merge_utils
    "peft": Dialect(
        whole_vector=False,
        entries=lambda density, size: int(density * size),
        weighted_election=False,
        zero_is_positive=True,
        by_weight=False,
        rescale="density",
    ),
}
