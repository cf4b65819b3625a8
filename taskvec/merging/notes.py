"""Notes on a merge: sentences about settings that have no effect on its vectors, or an unexpected one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from taskvec_formats import Checkpoint, TensorSpec

from ..analysis.overlap import meet, ranges
from ..reporting.progress import Progress
from ..vectors.layers import counted, recorded
from ..vectors.vector import TaskVector
from .settings import Depth, Setting, has_gradient

# tensor name -> number
_ByTensor = Mapping[str, float]


def notes_on(
    vectors: Sequence[TaskVector], settings: Iterable[Setting], depth: Depth, base: Checkpoint | None
) -> list[str]:
    """Notes on repeated vectors, and on the layers over which gradients are read.

    Args:
        vectors: The vectors to merge.
        settings: All weights, densities and λ.
        depth: The depth of each tensor, with the number of layers.
        base: The base, or None if it is not available.
    """
    return [*_repeated(vectors), *_assumed_layers(vectors, settings, depth, base)]


def _repeated(vectors: Sequence[TaskVector]) -> list[str]:
    """Notes on vectors that are given more than once."""
    names: dict[str, str] = {}
    notes = []
    for vector in vectors:
        identity = _identity(vector)
        if identity is None:
            continue
        first = names.get(identity)
        names.setdefault(identity, vector.name)
        if first == vector.name:
            notes.append(f"{first} is given twice and counts each time")
        elif first is not None:
            notes.append(f"{first} and {vector.name} are the same vector, which counts each time")
    return notes


def _identity(vector: TaskVector) -> str | None:
    """What identifies a vector; None if it was neither stored nor made from a checkpoint."""
    if vector.header.tuned is not None:
        return vector.header.tuned.fingerprint
    return vector.digest if vector.specs and vector.is_stored else None


def _assumed_layers(
    vectors: Sequence[TaskVector], settings: Iterable[Setting], depth: Depth, base: Checkpoint | None
) -> list[str]:
    """A note on the number of layers, if it is known from the tensors of the vectors only."""
    if base is not None or not any(map(has_gradient, settings)):
        return []
    known = {stack for vector in vectors for stack in recorded(vector.provenance)}
    present = {stack for vector in vectors for stack in counted(vector.specs)}
    assumed = ", ".join(f"{stack} {depth.layers[stack]}" for stack in sorted(present - known))
    return [f"gradients are read over the layers that the vectors hold ({assumed})"] if assumed else []


def divided_out(
    vectors: Sequence[TaskVector], weights: Sequence[_ByTensor], specs: Mapping[str, TensorSpec], progress: Progress
) -> list[str]:
    """A note on weights that have no effect, because normalizing by weight cancels them.

    Args:
        vectors: The vectors to merge.
        weights: One mapping per vector: tensor name -> weight.
        specs: Tensor name -> spec of the result.
        progress: Called while masks are compared.
    """
    if all(weight == 1 for shares in weights for weight in shares.values()):
        return []
    if first_meeting(vectors, specs, progress) is not None:
        return []
    return ["no two masks share a position, so normalizing by weight cancels the weights: they have no effect"]


def first_meeting(vectors: Sequence[TaskVector], specs: Mapping[str, TensorSpec], progress: Progress) -> str | None:
    """Find the first tensor in which two masks share a position.

    Args:
        vectors: The vectors to compare.
        specs: The tensors to compare, by name.
        progress: Called while masks are compared.

    Returns:
        The name of the tensor, or None if all masks are disjoint.
    """
    for done, name in enumerate(specs):
        progress("comparing masks", done, len(specs), name)
        for tensors in ranges(vectors, name):
            if any(meet(a, b) for a, b in combinations(tensors.values(), 2)):
                progress("comparing masks", len(specs), len(specs), "")
                return name
    progress("comparing masks", len(specs), len(specs), "")
    return None
