"""Selection of the entries of largest magnitude, over a whole vector or per tensor."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock

from taskvec_formats import SparseTensor
from taskvec_formats.sparse import Indices
from taskvec_formats.system.parallel import ordered_map

from .source import Vector
from .topk import Deltas, FloatArray, Key, TopK, top_k

_HELD = 1 << 24  # up to this number, magnitudes are kept in memory instead of being decoded three times


class Ranks:
    """The k entries of largest magnitude in a group of tensors, selected on first use. Ties go to the first.

    Zeros are never selected.

    Args:
        vector: The vector.
        names: The tensors of the group.
        k: The number of entries.
        at_most: Whether all non-zero entries are selected if there are fewer than k.
    """

    def __init__(self, vector: Vector, names: list[str], k: int, *, at_most: bool = True) -> None:
        self._vector = vector
        self._names = names
        self._k = k
        self._at_most = at_most
        self._selection: TopK | None = None
        self._lock = Lock()

    def largest(self, name: str, start: int, block: SparseTensor) -> Indices:
        """Return the indices of the entries of a block that are selected.

        Args:
            name: The name of the tensor.
            start: The position of the first element of the block.
            block: The entries of the block.

        Raises:
            MaskError: Fewer than k entries are non-zero, and `at_most` is False.
        """
        with self._lock:
            if self._selection is None:
                self._selection = top_k(_held(self._magnitudes), self._k, at_most=self._at_most)
        return self._selection.indices((name, start), block.values)

    def _magnitudes(self) -> Iterator[tuple[Key, FloatArray]]:
        jobs = ((name, span) for name in self._names for span in self._vector.specs[name].form.blocks())

        def read(job: tuple[str, tuple[int, int]]) -> tuple[Key, FloatArray]:
            name, span = job
            return (name, span[0]), self._vector.change(name, *span).delta.values

        return ordered_map(read, jobs) if len(self._names) > 1 else map(read, jobs)


def _held(parts: Deltas) -> Deltas:
    """Return the same parts, read once and cached if they are small."""
    kept, count = [], 0
    for part in parts():
        kept.append(part)
        count += len(part[1])
        if count > _HELD:
            return parts
    return lambda: kept
