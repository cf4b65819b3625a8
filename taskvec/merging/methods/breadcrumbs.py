"""Model Breadcrumbs: of each tensor neither the largest changes nor the small ones (arXiv 2312.06795, section 3)."""

from typing import Annotated

import numpy as np

from taskvec_formats import SparseTensor
from taskvec_formats.sparse import Indices

from ...vectors.ranks import Ranks
from .options import Bounds
from .pruning import Keep, Request


def outliers(request: Request, *, gamma: Annotated[float, Bounds(0, 1, below=True)] = 0.01) -> Keep:
    """Leave out the share `gamma` of each tensor's weights that moved most; of the rest keep the largest, `density`.

    Where both together are more than there is, fewer of the largest are left out.
    """
    ranks = {}
    for name, spec in request.vector.specs.items():
        kept = int(request.density(name) * spec.size)
        left_out = min(int(gamma * spec.size), spec.size - kept)
        ranks[name] = [Ranks(request.vector, [name], k) for k in (left_out, left_out + kept)]

    def keep(name: str, start: int, block: SparseTensor) -> Indices:
        largest, inside = (rank.largest(name, start, block) for rank in ranks[name])
        return np.setdiff1d(inside, largest, assume_unique=True)

    return keep
