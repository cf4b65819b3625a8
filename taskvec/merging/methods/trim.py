"""Trim: keep the entries of largest magnitude (TIES, arXiv 2306.01708, Algorithm 1, step 1)."""

from ...errors import UsageError
from ...vectors.ranks import Ranks
from .dialects import DIALECTS
from .pruning import Keep, Request


def trim(request: Request) -> Keep:
    """Keep the entries of largest magnitude, of each tensor or of the whole vector, depending on the dialect.

    The density is relative to the eligible weights, not to the entries: a density of 0.2 keeps all entries of a vector
    whose own density is 0.01.

    Args:
        request: The vector, its densities and the dialect.

    Returns:
        The function that selects the entries to keep.

    Raises:
        UsageError: The dialect trims the whole vector, and the density differs between tensors.
    """
    vector, dialect = request.vector, request.dialect
    if dialect.whole_vector:
        densities = {request.density(name) for name in vector.specs}
        if len(densities) > 1:
            others = " or ".join(f"`dialect={name}`" for name, rules in DIALECTS.items() if not rules.whole_vector)
            raise UsageError(
                f"`density` of {vector.name} must be one number for all tensors, because the dialect {dialect.name} "
                f"trims a vector as a whole, found {min(densities):g} to {max(densities):g}; give one number, or "
                f"choose {others}, which trim each tensor"
            )
        k = dialect.entries(max(densities, default=0.0), vector.eligible)
        request.note_if_idle(k >= sum(spec.entries for spec in vector.specs.values()))
        return Ranks(vector, list(vector.specs), k).largest
    kept = {name: dialect.entries(request.density(name), spec.size) for name, spec in vector.specs.items()}
    request.note_if_idle(all(kept[name] >= spec.entries for name, spec in vector.specs.items()))
    ranks = {name: Ranks(vector, [name], k) for name, k in kept.items()}
    return lambda name, start, block: ranks[name].largest(name, start, block)
