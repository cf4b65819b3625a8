"""Dialects: the numerical conventions of merge programs.

Programs implement the same methods with different details, and so compute different numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

DialectName: TypeAlias = Literal["reference", "mergekit", "peft"]


@dataclass(frozen=True)
class Dialect:
    """How one program handles what the papers leave open, or where it deviates from them.

    Attributes:
        name: The name of the dialect.
        whole_vector: Whether the largest entries are selected over the whole vector, or for each tensor separately.
        entries: (density, number of weights) -> number of entries to keep.
        weighted_election: Whether weights count in the election of signs.
        zero_is_positive: Whether the positive sign is elected if the total is zero. If not, the entry is dropped.
        by_weight: Whether a mean is divided by the sum of the weights of the agreeing vectors, or by their number.
        rescale: The factor of the entries that remain after entries were dropped at random: "density", 1 / density;
            "norm", the factor that preserves the sum of magnitudes of each tensor.
    """

    name: DialectName
    whole_vector: bool
    entries: Callable[[float, int], int]
    weighted_election: bool
    zero_is_positive: bool
    by_weight: bool
    rescale: str


DIALECTS: dict[DialectName, Dialect] = {
    # the papers: arXiv 2306.01708, Algorithm 1; arXiv 2311.03099, section 3
    "reference": Dialect(
        name="reference",
        whole_vector=True,
        entries=lambda density, size: round(density * size),
        weighted_election=True,
        zero_is_positive=False,
        by_weight=False,
        rescale="density",
    ),
    # mergekit 0.1.5, generalized_task_arithmetic
    "mergekit": Dialect(
        name="mergekit",
        whole_vector=False,
        entries=lambda density, size: max(1, int(density * size)) if density > 0 and size else 0,
        weighted_election=True,
        zero_is_positive=True,
        by_weight=True,
        rescale="norm",
    ),
    # peft 0.21, utils.merge_utils
    "peft": Dialect(
        name="peft",
        whole_vector=False,
        entries=lambda density, size: int(density * size),
        weighted_election=False,
        zero_is_positive=True,
        by_weight=False,
        rescale="density",
    ),
}
