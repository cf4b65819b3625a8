"""Overlap of task vectors: shared positions, the overlap expected by chance, sign conflicts, cosine similarity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from taskvec_formats import SparseTensor
from taskvec_formats.forms import BLOCK_ELEMENTS

from ..arguments import instances
from ..errors import BaseMismatchError
from ..names import layer_and_module
from ..reporting.progress import Progress, silent
from ..vectors.positions import common
from ..vectors.vector import TaskVector

Module = tuple[int | None, str]


@dataclass(frozen=True)
class Cell:
    """Counts of entries of two vectors, a and b, in one tensor or in several tensors together.

    Attributes:
        a: Entries of a.
        b: Entries of b.
        intersection: Positions at which both have an entry.
        sign_conflicts: Shared positions at which the signs are opposite.
    """

    a: int = 0
    b: int = 0
    intersection: int = 0
    sign_conflicts: int = 0

    def __add__(self, other: Cell) -> Cell:
        return Cell(
            self.a + other.a,
            self.b + other.b,
            self.intersection + other.intersection,
            self.sign_conflicts + other.sign_conflicts,
        )

    @property
    def union(self) -> int:
        """The number of positions at which a or b has an entry."""
        return self.a + self.b - self.intersection

    @property
    def jaccard(self) -> float:
        """The Jaccard index, intersection / union; 0 if both are empty."""
        return self.intersection / self.union if self.union else 0.0


@dataclass(frozen=True)
class Overlap:
    """The overlap of two vectors.

    Attributes:
        a: The index of the first vector in the list that was given.
        b: The index of the second vector.
        total: The counts over all tensors.
        expected_jaccard: The Jaccard index of two independent uniformly random masks of the same sizes over the same
            eligible weights, from the expected intersection |a|·|b|/N.
        cosine: The cosine similarity of the two delta vectors. Positions outside a mask count as 0.
        modules: (layer, module) -> counts. The layer is None for tensors outside the transformer blocks.
    """

    a: int
    b: int
    total: Cell
    expected_jaccard: float
    cosine: float
    modules: dict[Module, Cell]


def overlap(vectors: Sequence[TaskVector], progress: Progress = silent) -> list[Overlap]:
    """Compare every pair of vectors, tensor by tensor.

    Masks are compared, so an explicit zero is an entry. Memory: a block of each vector.

    Args:
        vectors: The vectors.
        progress: Called for every tensor.

    Returns:
        One overlap per pair, in the order (0, 1), (0, 2), …, (1, 2), ….

    Raises:
        UsageError: `vectors` is not a list of vectors.
        KindError: One of them is a patch, which has no mask.
        BaseMismatchError: A tensor has different shapes in two vectors.
    """
    instances("vectors", vectors, TaskVector)
    pairs = list(combinations(range(len(vectors)), 2))
    modules: dict[tuple[int, int], dict[Module, Cell]] = {pair: {} for pair in pairs}
    dots = np.zeros((len(vectors), len(vectors)))
    names = sorted({name for vector in vectors for name in vector.specs})
    for done, name in enumerate(names):
        progress("comparing", done, len(names), name)
        place = layer_and_module(name)
        for a, b in pairs:
            modules[a, b].setdefault(place, Cell())
        for tensors in ranges(vectors, name):
            for i, tensor in tensors.items():
                dots[i, i] += _dot(tensor.values, tensor.values)
            for a, b in pairs:
                cell = Cell(len(tensors.get(a, ())), len(tensors.get(b, ())))
                if a in tensors and b in tensors:
                    in_a, in_b = common(tensors[a].indices, tensors[b].indices)
                    left, right = tensors[a].values[in_a], tensors[b].values[in_b]
                    conflicts = int(np.count_nonzero(np.sign(left) * np.sign(right) < 0))
                    cell = Cell(cell.a, cell.b, len(in_a), conflicts)
                    dots[a, b] += _dot(left, right)
                modules[a, b][place] += cell
    progress("comparing", len(names), len(names), "")
    return [
        _pair(vectors, a, b, modules[a, b], dots[a, b] / (math.sqrt(dots[a, a] * dots[b, b]) or math.inf))
        for a, b in pairs
    ]


def ranges(vectors: Sequence[TaskVector], name: str) -> Iterator[dict[int, SparseTensor]]:
    """Iterate over one tensor of several vectors, a range at a time.

    Blocks in which no vector has an entry are skipped.

    Args:
        vectors: The vectors.
        name: The tensor.

    Yields:
        Index of a vector -> its entries in the range, flat, for the vectors that have the tensor. A range has at most
        BLOCK_ELEMENTS elements.

    Raises:
        BaseMismatchError: The tensor has different shapes in two vectors.
    """
    specs = {number: vector.specs[name] for number, vector in enumerate(vectors) if name in vector.specs}
    first, *others = specs
    for other in others:
        if specs[other].shape != specs[first].shape:
            raise BaseMismatchError(
                f"tensor {name!r} is {specs[first].form} in {vectors[first].name} and {specs[other].form} in "
                f"{vectors[other].name}"
            )
    for block, span in enumerate(specs[first].form.blocks()):
        # a vector that was never stored has no list of blocks
        if any(not spec.blocks or spec.blocks[block] for spec in specs.values()):
            yield from _parts({number: vectors[number].change(name, *span).delta for number in specs})


def _parts(block: Mapping[int, SparseTensor]) -> Iterator[dict[int, SparseTensor]]:
    size = next(iter(block.values())).size
    for low in range(0, size, BLOCK_ELEMENTS):
        yield {number: delta.slice_range(low, min(low + BLOCK_ELEMENTS, size)) for number, delta in block.items()}


def meet(a: SparseTensor, b: SparseTensor) -> bool:
    """Return whether two tensors have an entry at the same position."""
    return bool(len(common(a.indices, b.indices)[0]))


def _dot(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.dot(left.astype(np.float64), right.astype(np.float64)))


def _pair(vectors: Sequence[TaskVector], a: int, b: int, modules: dict[Module, Cell], cosine: float) -> Overlap:
    total = sum(modules.values(), Cell())
    # the weights that either mask could have chosen from; these are the same if both vectors come from training
    sizes = {spec.name: spec.size for i in (a, b) for spec in vectors[i].specs.values() if spec.eligible}
    eligible = sum(sizes.values())
    chance = total.a * total.b / eligible if eligible else 0.0
    union = total.a + total.b - chance
    return Overlap(a, b, total, chance / union if union else 0.0, cosine, modules)
