"""Vectors that are to be merged have one base."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import permutations

from ..errors import BaseMismatchError
from ..vectors.vector import TaskVector


def check_bases(vectors: Sequence[TaskVector]) -> None:
    """Raise BaseMismatchError where two bases differ and one of the vectors starts from what another leads to.

    They are to be composed, not merged, and the error says how.
    """
    if len({vector.base.fingerprint for vector in vectors}) == 1:
        return
    for first, second in permutations(vectors, 2):
        if _follows(first, second):
            raise BaseMismatchError(
                f"the vectors have different bases: {second.name} starts from {first.base.name} with {first.name} on "
                f'it; taskvec arith "{_word(first)} >> {_word(second)}" --base BASE makes one vector of both'
            )


def _word(vector: TaskVector) -> str:
    """The name of a vector's file in an expression."""
    return vector.name if re.fullmatch(r"[\w./-]+", vector.name) else f"'{vector.name}'"


def _follows(first: TaskVector, second: TaskVector) -> bool:
    """Whether `second` says that it starts from what `first` leads to."""
    if first.base.fingerprint == second.base.fingerprint:
        return False
    if first.leads_to is not None:
        return first.leads_to.fingerprint == second.base.fingerprint
    # a trained vector does not know what it leads to, but what was trained after it says where it began
    run = second.provenance.get("run")
    start = run.get("start_from") if isinstance(run, dict) else None
    return isinstance(start, dict) and start.get("digest") == first.digest
