"""Model Breadcrumbs: drop the largest and the small changes of each tensor (arXiv 2312.06795, section 3)."""

from typing import Annotated

import numpy as np

from taskvec_formats import SparseTensor
from taskvec_formats.sparse import Indices

from ...vectors.ranks import Ranks
from .options import Bounds
from .pruning import Keep, Request


def outliers(request: Request, *, gamma: Annotated[float, Bounds(0, 1, below=True)] = 0.01) -> Keep:
    """Drop the largest changes of each tensor, then keep the largest of the rest.

    Args:
        request: The vector and its densities. The density of a tensor of n weights keeps ⌊density · n⌋ entries.
        gamma: The share of each tensor's weights whose changes are dropped as too large. Fewer are dropped if `gamma`
            and the density together exceed 1.

    Returns:
        The function that selects the entries to keep.
    """
    specs = request.vector.specs
    kept = {name: int(request.density(name) * spec.size) for name, spec in specs.items()}
    wanted = {name: int(gamma * spec.size) for name, spec in specs.items()}
    left_out = {name: min(wanted[name], spec.size - kept[name]) for name, spec in specs.items()}
    if left_out != wanted:
        request.notes.append(
            f"the density and a gamma of {gamma:g} add up to more than 1: fewer of the largest changes of "
            f"{request.vector.name} are dropped"
        )
    request.note_if_idle(all(left_out[name] + kept[name] >= spec.entries for name, spec in specs.items()))
    ranks = {
        name: [Ranks(request.vector, [name], k) for k in (left_out[name], left_out[name] + kept[name])]
        for name in specs
    }

    def keep(name: str, start: int, block: SparseTensor) -> Indices:
        largest, inside = (rank.largest(name, start, block) for rank in ranks[name])
        return np.setdiff1d(inside, largest, assume_unique=True)

    return keep
