"""Writing of a vector of which each process has a part.

Processes take turns at the blocks of the file. Each sends its entries of a block to the process whose turn it is, which
encodes them; the first process writes the encoded blocks to the file. No process has more than some blocks in memory,
and only the first one needs access to the file. The bytes are those that one process would write.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

from taskvec_formats import Change, FormatError, TensorSpec
from taskvec_formats.header import Block
from taskvec_formats.system.parallel import ordered_map, threads

from ..errors import TaskvecError, TrainingError
from ..reporting.progress import Progress
from ..vectors.vector import TaskVector
from .processes import Processes

Owned = Callable[[str], tuple[int, int]]
_Job = tuple[TensorSpec, int]


def write_together(vector: TaskVector, path: Path, owned: Owned, processes: Processes, progress: Progress) -> None:
    """Write a vector of which each process has a part. All processes must call this together.

    Args:
        vector: The vector. In each process, it has the entries of the ranges that the process has.
        path: The file to write. An existing one is replaced.
        owned: Returns the range of a tensor's elements that this process has. The ranges of the processes with one
            replica of the model make up the tensor, in their order.
        processes: The processes.
        progress: Called while the file is written.

    Raises:
        TaskvecError: A process has failed.
    """
    with processes.agreeing():
        if processes.in_first_replica:
            blocks = _Blocks(vector, owned, processes)
            try:
                if processes.is_first:
                    vector.write(path, iter(blocks), progress, force=True)
                else:
                    for _ in blocks:
                        pass
            finally:
                blocks.stop()


class _Blocks:
    """The encoded blocks of all tensors in the first process; nothing in others.

    Args:
        vector: The vector.
        owned: As in `write_together`.
        processes: The processes.
    """

    def __init__(self, vector: TaskVector, owned: Owned, processes: Processes) -> None:
        self._vector = vector
        self._owned = owned
        self._processes = processes
        self._waited_for = True  # whether the others wait to hear from the first process

    def __iter__(self) -> Iterator[tuple[Block | None, bytes]]:
        jobs = [(spec, number) for spec in self._vector.specs.values() for number in range(spec.form.block_count)]
        window = self._processes.shards * 2 * threads()
        for first in range(0, len(jobs), window):
            if not all(self._processes.gather_parts(True)):
                self._waited_for = False
                return  # the first process raises its error
            self._waited_for = False
            encoded = _window(self._vector, jobs[first : first + window], self._owned, self._processes)
            self._waited_for = first + window < len(jobs)
            yield from encoded
        self._waited_for = False

    def stop(self) -> None:
        """Tell the other processes if the first one has stopped before the last block."""
        if self._waited_for and self._processes.is_first:
            self._processes.gather_parts(False)


def _window(
    vector: TaskVector, jobs: list[_Job], owned: Owned, processes: Processes
) -> list[tuple[Block | None, bytes]]:
    """Encode some blocks: block j in process j modulo their number. Others than the first process get an empty list.

    Raises:
        TrainingError: A process has failed.
    """
    found: list[tuple[Block | None, bytes]] = []
    failure = ""
    try:
        outgoing = [
            pickle.dumps([_own(vector, job, owned) for job in jobs[turn :: processes.shards]])
            for turn in range(processes.shards)
        ]
    except (TaskvecError, FormatError, OSError) as error:
        outgoing, failure = [pickle.dumps(None)] * processes.shards, str(error)
    parts = [pickle.loads(message) for message in processes.swap(outgoing)]
    if all(part is not None for part in parts):
        try:
            found = _encoded(vector, jobs[processes.shard :: processes.shards], parts)
        except (TaskvecError, FormatError, OSError, ValueError) as error:
            failure = str(error)
    if failures := list(filter(None, processes.gather_parts(failure))):
        raise TrainingError(failures[0])
    encoded = processes.to_first(found)
    return [encoded[n % processes.shards][n // processes.shards] for n in range(len(jobs) if encoded else 0)]


def _encoded(
    vector: TaskVector, turns: list[_Job], parts: list[list[tuple[int, Change] | None]]
) -> list[tuple[Block | None, bytes]]:
    """Encode the blocks whose turn it is here, from the entries that each process has sent."""
    whole = [(job, _joined(job, list(pieces))) for job, *pieces in zip(turns, *parts, strict=True)]

    def encode(item: tuple[_Job, Change]) -> tuple[Block | None, bytes]:
        (spec, number), change = item
        return vector.encode(spec, number, change)

    return list(ordered_map(encode, whole))


def _own(vector: TaskVector, job: _Job, owned: Owned) -> tuple[int, Change] | None:
    """The entries of a block that this process has, with the position in the block at which they start."""
    spec, number = job
    (start, stop), (low, high) = spec.form.block(number), owned(spec.name)
    first, end = max(start, low), min(stop, high)
    return (first - start, vector.change(spec.name, first, end)) if first < end else None


def _joined(job: _Job, pieces: list[tuple[int, Change] | None]) -> Change:
    spec, number = job
    start, stop = spec.form.block(number)
    return Change.joined([piece for piece in pieces if piece is not None], 0, stop - start, spec.dtype)
