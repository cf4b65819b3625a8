"""The check that vectors of a merge have one base, with advice for vectors that follow one another."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import permutations

from ..errors import BaseMismatchError
from ..vectors.vector import TaskVector


def check_bases(vectors: Sequence[TaskVector]) -> None:
    """Refuse vectors of different bases if one of them starts from the result of another.

    Such vectors must be composed instead of merged, and the error says how.

    Args:
        vectors: The vectors to merge.

    Raises:
        BaseMismatchError: One vector starts from the result of another.
    """
    if len({vector.base.fingerprint for vector in vectors}) == 1:
        return
    for first, second in permutations(vectors, 2):
        if _follows(first, second):
            raise BaseMismatchError(
                f"the vectors have different bases: {second.name} starts from {first.base.name} with {first.name} "
                f'applied; taskvec arith "{_quoted(first)} >> {_quoted(second)}" --base BASE composes them'
            )


def _quoted(vector: TaskVector) -> str:
    """The name of a vector's file, quoted if necessary for an expression."""
    return vector.name if re.fullmatch(r"[\w./-]+", vector.name) else f"'{vector.name}'"


def _follows(first: TaskVector, second: TaskVector) -> bool:
    """Whether the base of `second` is the result of `first`, as far as their headers record it."""
    if first.base.fingerprint == second.base.fingerprint:
        return False
    if first.leads_to is not None:
        return first.leads_to.fingerprint == second.base.fingerprint
    # a trained vector does not record its result, but a vector that was trained from it records its digest
    run = second.provenance.get("run")
    start = run.get("start_from") if isinstance(run, dict) else None
    return isinstance(start, dict) and start.get("digest") == first.digest
