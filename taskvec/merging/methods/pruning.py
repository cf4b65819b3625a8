"""A vector of which a part of the entries is kept, and those perhaps grow in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

import numpy as np

from taskvec_formats import SparseTensor
from taskvec_formats.sparse import Indices

from ...vectors.sums import addend
from ...vectors.vector import TaskVector
from .dialects import Dialect, DialectName

# of a tensor's name, the first element of one of its blocks, and the block's entries: the places of those that stay
Keep: TypeAlias = Callable[[str, int, SparseTensor], Indices]
Rescale: TypeAlias = Literal["none", "density", "norm"]


@dataclass(frozen=True)
class Request:
    """What a step is to keep of a vector.

    number: of the vector among those that are merged. density: tensor name -> the share that stays, in [0, 1].
    """

    vector: TaskVector
    number: int
    density: Callable[[str], float]
    dialect: Dialect


class Pruned:
    """The entries that a step keeps, block by block.

    rescale: "none"; "density", they are divided by the density; "norm", they grow until the sum of the tensor's
        magnitudes is what it was.
    """

    def __init__(self, request: Request, keep: Keep, rescale: str) -> None:
        self._request = request
        self._keep = keep
        self._rescale = rescale
        self._growth = cache(self._grown)

    def __call__(self, name: str, start: int, stop: int) -> SparseTensor:
        """The entries of the range [start, stop) of a tensor."""
        return SparseTensor.concat(list(self._blocks(name, start, stop)), start, stop, np.float32)

    def _blocks(self, name: str, start: int, stop: int) -> Iterator[tuple[int, SparseTensor]]:
        # a block at a time: ties are counted in them
        density = self._request.density(name)
        for first, end in self._request.vector.specs[name].form.blocks_of(start, stop):
            kept = self._kept(name, first, end, density)
            if self._rescale == "density" and 0 < density < 1:
                kept = kept.with_values(kept.values / np.float32(density))
            elif self._rescale == "norm":
                kept = kept.with_values(kept.values * self._growth(name))
            yield first, kept

    def _kept(self, name: str, first: int, end: int, density: float) -> SparseTensor:
        vector = self._request.vector
        block = addend(vector.name, vector.specs[name], vector.change(name, first, end))
        return block if density >= 1 else block.take(self._keep(name, first, block))

    def _grown(self, name: str) -> np.float32:
        """By what the entries of a tensor grow to keep its norm; not at all where there is hardly one."""
        before = after = 0.0
        density = self._request.density(name)
        for span in self._request.vector.specs[name].form.blocks():
            whole = self._request.vector.change(name, *span).delta.values
            before += float(np.abs(whole).sum(dtype=np.float64))
            after += float(np.abs(self._kept(name, *span, density).values).sum(dtype=np.float64))
        return np.float32(1) if min(before, after) < 1e-7 else np.float32(before) / np.float32(after)


def pruning_options(*, dialect: DialectName = "reference", rescale: Rescale | None = None) -> None:
    """The options of every method that prunes, beside its density.

    Args:
        dialect: Which implementation to match.
        rescale: How the entries that stay grow; None as in the dialect.
    """
