"""Trim: keep the entries of largest magnitude (TIES, arXiv 2306.01708, Algorithm 1, step 1)."""

from ...errors import UsageError
from ...vectors.ranks import Ranks
from .pruning import Keep, Request


def trim(request: Request) -> Keep:
    """Of each tensor, or of the whole vector, the entries of largest magnitude, as many as the density asks for.

    The density counts eligible weights, not entries: 0.2 of a vector that is 1 % dense is all of it.
    """
    vector, dialect = request.vector, request.dialect
    if dialect.whole_vector:
        densities = {request.density(name) for name in vector.specs}
        if len(densities) > 1:
            raise UsageError("this dialect trims a vector as a whole: its density is one number for all tensors")
        k = dialect.entries(max(densities, default=0.0), vector.eligible)
        return Ranks(vector, list(vector.specs), k).largest
    ranks = {
        name: Ranks(vector, [name], dialect.entries(request.density(name), spec.size))
        for name, spec in vector.specs.items()
    }
    return lambda name, start, block: ranks[name].largest(name, start, block)
