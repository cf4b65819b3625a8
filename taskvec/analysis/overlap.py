"""Where task vectors collide: shared positions, what chance would give, opposite signs, the angle between them."""

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
    """Entries of one tensor, or of several added up: of a, of b, at the same position, with opposite signs there."""

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
        """Positions that a or b holds."""
        return self.a + self.b - self.intersection

    @property
    def jaccard(self) -> float:
        """intersection / union; 0 where both are empty."""
        return self.intersection / self.union if self.union else 0.0


@dataclass(frozen=True)
class Overlap:
    """How two vectors overlap.

    a, b: their numbers in the list given. total: over all tensors.
    expected_jaccard: that of two independent uniformly random masks of the same sizes over the same eligible weights,
        from the expected intersection |a|·|b|/N.
    cosine: of the two delta vectors, every position outside a mask counting as 0.
    modules: (layer, module) -> Cell; layer None for tensors outside the transformer blocks.
    """

    a: int
    b: int
    total: Cell
    expected_jaccard: float
    cosine: float
    modules: dict[Module, Cell]


def overlap(vectors: Sequence[TaskVector], progress: Progress = silent) -> list[Overlap]:
    """Compare every pair of vectors, tensor by tensor. Masks are compared, so an explicit zero is a held position.

    Memory: a block of each. Raises UsageError for anything but a list of vectors, KindError for a patch, which has no
    mask, BaseMismatchError where a tensor has another shape in another vector.
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
    """One tensor of several vectors, a range at a time: the number of each that has it -> its entries there, flat.

    A range has at most BLOCK_ELEMENTS elements. Blocks in which no vector holds an entry are left out.

    Raises:
        BaseMismatchError: The tensor has another shape in one of them.
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
        # a vector that was not stored yet has no list of blocks
        if any(not spec.blocks or spec.blocks[block] for spec in specs.values()):
            yield from _parts({number: vectors[number].change(name, *span).delta for number in specs})


def _parts(block: Mapping[int, SparseTensor]) -> Iterator[dict[int, SparseTensor]]:
    size = next(iter(block.values())).size
    for low in range(0, size, BLOCK_ELEMENTS):
        yield {number: delta.slice_range(low, min(low + BLOCK_ELEMENTS, size)) for number, delta in block.items()}


def meet(a: SparseTensor, b: SparseTensor) -> bool:
    """Whether two tensors hold a position in common."""
    return bool(len(common(a.indices, b.indices)[0]))


def _dot(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.dot(left.astype(np.float64), right.astype(np.float64)))


def _pair(vectors: Sequence[TaskVector], a: int, b: int, modules: dict[Module, Cell], cosine: float) -> Overlap:
    total = sum(modules.values(), Cell())
    # the weights either mask could have chosen from; both name the same ones when both come from training
    sizes = {spec.name: spec.size for i in (a, b) for spec in vectors[i].specs.values() if spec.eligible}
    eligible = sum(sizes.values())
    chance = total.a * total.b / eligible if eligible else 0.0
    union = total.a + total.b - chance
    return Overlap(a, b, total, chance / union if union else 0.0, cosine, modules)
