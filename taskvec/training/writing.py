"""Writing of a vector of which each process has a part.

Processes take turns at the blocks of the file. Each sends its entries of a block to the process whose turn it is, which
encodes them; the first process writes the encoded blocks to the file. No process has more than some blocks in memory,
and only the first one needs access to the file. The bytes are those that one process would write.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path

from taskvec_formats import Change, TensorSpec
from taskvec_formats.header import Block
from taskvec_formats.system.parallel import ordered_map, threads

from ..errors import TrainingError
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
        if processes.is_first:
            with closing(_blocks(vector, owned, processes)) as blocks:
                vector.write(path, blocks, progress, force=True)
        elif processes.in_first_replica:
            for _ in _blocks(vector, owned, processes):
                pass


def _blocks(
    vector: TaskVector, owned: Owned, processes: Processes
) -> Generator[tuple[Block | None, bytes], None, None]:
    """Yield the encoded blocks of all tensors in the first process; nothing in others."""
    jobs = [(spec, number) for spec in vector.specs.values() for number in range(spec.form.block_count)]
    window = processes.shards * 2 * threads()
    made = 0
    try:
        for first in range(0, len(jobs), window):
            if not all(processes.gather_parts(True)):
                raise TrainingError("the first process could not write the file")
            for block in _window(vector, jobs[first : first + window], owned, processes):
                made += 1
                yield block
    finally:
        if made < len(jobs) and processes.is_first:
            processes.gather_parts(False)  # the others do not wait for this one


def _window(
    vector: TaskVector, jobs: list[_Job], owned: Owned, processes: Processes
) -> Iterator[tuple[Block | None, bytes]]:
    """Encode some blocks: block j in process j modulo their number."""
    outgoing = [
        pickle.dumps([_own(vector, job, owned) for job in jobs[turn :: processes.shards]])
        for turn in range(processes.shards)
    ]
    parts = zip(*map(pickle.loads, processes.swap(outgoing)), strict=True)  # for each block, those of all processes
    turns = jobs[processes.shard :: processes.shards]
    mine = [(job, _joined(job, list(pieces))) for job, pieces in zip(turns, parts, strict=True)]

    def encode(item: tuple[_Job, Change]) -> tuple[Block | None, bytes]:
        (spec, number), change = item
        return vector.encode(spec, number, change)

    encoded = processes.to_first(list(ordered_map(encode, mine)))
    for number in range(len(jobs) if encoded else 0):
        yield encoded[number % processes.shards][number // processes.shards]


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
