"""Pruning of vectors before they are combined: some entries are kept, and optionally rescaled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from taskvec_formats import SparseTensor
from taskvec_formats.dtypes import DType
from taskvec_formats.sparse import Indices

from ...vectors.sums import addend
from ...vectors.vector import TaskVector
from .dialects import Dialect, DialectName


class Sampled(NamedTuple):
    """Entries that a pruning step keeps at random.

    Attributes:
        indices: The indices of the entries to keep, [n].
        shares: The probability with which each of them was kept, f32 [n], or one number for all.
    """

    indices: Indices
    shares: npt.NDArray[np.float32] | np.float32


# (tensor name, first element of a block, entries of the block) -> indices of the entries to keep
Keep: TypeAlias = Callable[[str, int, SparseTensor], "Indices | Sampled"]
Rescale: TypeAlias = Literal["none", "density", "norm"]


@dataclass(frozen=True)
class Request:
    """The input of a pruning step.

    Attributes:
        vector: The vector to prune.
        number: The index of the vector in the merge.
        density: Tensor name -> the share of its weights to keep, in [0, 1].
        dialect: The conventions to follow.
        dtype: Tensor name -> the dtype to which results of single operations are rounded; None leaves them in f32.
        notes: Sentences on settings that have no effect. The pruning step appends to them.
    """

    vector: TaskVector
    number: int
    density: Callable[[str], float]
    dialect: Dialect
    dtype: Callable[[str], DType | None] = lambda name: None
    notes: list[str] = field(default_factory=list)

    def note_if_idle(self, idle: bool) -> None:
        """Append a note if the density trims nothing because the vector is already sparser.

        Args:
            idle: Whether no entry is too small to be kept. It is ignored if the vector is lazy, whose number of entries
                is unknown.
        """
        asked = sorted({self.density(name) for name in self.vector.specs})
        if not (idle and self.vector.is_stored) or asked in ([], [1.0]):
            return
        own = sum(spec.entries for spec in self.vector.specs.values())
        share = own / self.vector.eligible if self.vector.eligible else 0.0
        text = f"{asked[0]:g}" if len(asked) == 1 else f"{asked[0]:g} to {asked[-1]:g}"
        self.notes.append(f"density {text} trims nothing from {self.vector.name}, whose own density is {share:.2%}")


class Pruned:
    """The entries that a pruning step keeps, computed per block.

    Args:
        request: The vector, its densities and the dialect.
        keep: Selects the entries to keep.
        rescale: How they are rescaled. "none": unchanged. "density": divided by the probability with which they are
            kept. "norm": multiplied so that the sum of magnitudes of each tensor is preserved.
    """

    def __init__(self, request: Request, keep: Keep, rescale: str) -> None:
        self._request = request
        self._keep = keep
        self._rescale = rescale
        self._is_random = False
        self._norm_factor = cache(self._compute_norm_factor)

    def __call__(self, name: str, start: int, stop: int) -> SparseTensor:
        """The pruned entries of a range of a tensor.

        Args:
            name: The name of the tensor.
            start: The first element.
            stop: The end of the range, exclusive.
        """
        return SparseTensor.concat(list(self._blocks(name, start, stop)), start, stop, np.float32)

    def _blocks(self, name: str, start: int, stop: int) -> Iterator[tuple[int, SparseTensor]]:
        # per block: ties of magnitude are resolved per block
        density = self._request.density(name)
        for first, end in self._request.vector.specs[name].form.blocks_of(start, stop):
            kept, shares = self._kept(name, first, end, density)
            if self._rescale == "density" and 0 < density < 1:
                kept = kept.with_values(kept.values / shares)
            elif self._rescale == "norm":
                kept = kept.with_values(self._rounded(name, kept.values * self._norm_factor(name)))
            yield first, kept

    def _kept(self, name: str, first: int, end: int, density: float) -> tuple[SparseTensor, Any]:
        """The entries of a block that are kept, and the probability or probabilities with which they are."""
        vector = self._request.vector
        block = addend(vector.name, vector.specs[name], vector.change(name, first, end))
        if density >= 1:
            return block, np.float32(1)
        found = self._keep(name, first, block)
        if isinstance(found, Sampled):
            self._is_random = True
            return block.take(found.indices), found.shares
        return block.take(found), np.float32(density)

    def _rounded(self, name: str, values: Any) -> Any:
        dtype = self._request.dtype(name)
        return values if dtype is None else dtype.narrowed(values)

    def _compute_norm_factor(self, name: str) -> np.float32:
        """The factor that preserves the sum of magnitudes of a tensor, or 1 if that sum is below 1e-7."""
        before = after = 0.0
        density = self._request.density(name)
        for span in self._request.vector.specs[name].form.blocks():
            whole = self._request.vector.change(name, *span).delta.values
            before += float(np.abs(whole).sum(dtype=np.float64))
            after += float(np.abs(self._kept(name, *span, density)[0].values).sum(dtype=np.float64))
        sums = [np.float32(before), np.float32(after)]
        if not self._in_f32(name):
            sums = [self._rounded(name, total) for total in sums]
        if min(sums) < 1e-7:
            return np.float32(1)
        return sums[0] / sums[1] if self._in_f32(name) else self._rounded(name, sums[0] / sums[1])

    def _in_f32(self, name: str) -> bool:
        """Whether the factor is computed in f32, as mergekit does for F16 after entries were dropped at random."""
        dtype = self._request.dtype(name)
        return dtype is None or (self._is_random and dtype.name == "F16")


def pruning_options(*, dialect: DialectName = "reference", rescale: Rescale | None = None) -> None:
    """Declare the options that all pruning methods have in addition to the density.

    Args:
        dialect: The program whose results to match.
        rescale: How the remaining entries are rescaled. None takes the dialect's choice.
    """
