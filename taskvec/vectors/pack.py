"""Writing the vector of two checkpoints to a file in one pass over them.

`diff(base, tuned).save(path)` writes the same bytes, but reads both checkpoints twice: the digests of all tensors are
part of a vector, and large checkpoints do not stay in the page cache.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from taskvec_formats import Checkpoint, Kind
from taskvec_formats.blocks import AUTO
from taskvec_formats.checkpoint import begin_digest
from taskvec_formats.header import Block
from taskvec_formats.system.atomic import naming
from taskvec_formats.system.parallel import ordered_map, shares
from taskvec_formats.system.spool import Piece, Spools

from ..reporting.progress import Progress, silent
from ..reporting.throughput import Throughput, bytes_of
from .carried import carried
from .diff import Pair, check_pair, diff, header_of, spec_of
from .encoding import encode
from .vector import TaskVector


@dataclass(frozen=True)
class _Read:
    """What one pass over a tensor of both checkpoints finds.

    Attributes:
        before: Digest of the tensor in the base, in hex; None if the base lacks it.
        after: Digest of the tensor in the tuned checkpoint, likewise.
        blocks: The encoded blocks of the change, and where their bytes are.
    """

    before: str | None
    after: str | None
    blocks: tuple[tuple[Block | None, Piece], ...]


def pack(
    base: Checkpoint,
    tuned: Checkpoint,
    path: Path,
    kind: Kind = "vector",
    codec: str = AUTO,
    progress: Progress = silent,
    *,
    force: bool = False,
) -> None:
    """Write the vector or patch from base to tuned, with every change, to a `.lota` file.

    Each tensor is read, hashed and encoded by one worker, block by block. If both checkpoints are hashed already, as
    those in memory are, only the tensors that changed are read.

    Args:
        base: The model before fine-tuning.
        tuned: The model after fine-tuning.
        path: The file to write, which `check_file` has checked.
        kind: As in `diff`.
        codec: As in `TaskVector.save`.
        progress: Called for every tensor.
        force: Whether to replace an existing file.

    Raises:
        OutputExistsError: `path` exists and `force` is False.
        DiffError, FormatError: As in `diff` and `TaskVector.save`.
    """
    if base.is_hashed and tuned.is_hashed:
        diff(base, tuned, None, progress, kind).save(path, progress, codec, force=force)
        return
    check_pair(base, tuned, kind)
    stored = carried(tuned)
    names = sorted(base.tensors.keys() | tuned.tensors.keys())
    specs = {name: spec_of(base, tuned, name, {}) for name in tuned.tensors}
    pair = Pair(base, tuned, specs, kind, stored.files)
    sizes = [bytes_of(base, name) + bytes_of(tuned, name) for name in names]
    workers = shares(sizes)
    with Spools(path.parent, max(workers) + 1) as spools:

        def read(job: tuple[str, int]) -> _Read:
            name, worker = job
            return _read(pair, name, codec, path, spools, worker)

        found: dict[str, _Read] = {}
        rate = Throughput()
        jobs = zip(names, workers, strict=True)
        with closing(ordered_map(read, jobs, processes=True, workers=workers)) as results:
            progress("packing", 0, len(names), "")
            for done, (name, result, size) in enumerate(zip(names, results, sizes, strict=True), 1):
                found[name] = result
                progress("packing", done, len(names), rate.after(size))
        base.remember({name: each.before for name, each in found.items() if each.before is not None})
        tuned.remember({name: each.after for name, each in found.items() if each.after is not None})
        changed = [name for name in specs if found[name].before != found[name].after]
        digests = base.digests()
        vector = TaskVector(
            header_of(pair, changed, stored.left_out),
            [spec_of(base, tuned, name, digests) for name in changed],
            pair,
            tuned.name,
        )
        blocks = chain.from_iterable(found[name].blocks for name in changed)
        vector.write(path, blocks, progress, force=force)


def _read(pair: Pair, name: str, codec: str, path: Path, spools: Spools, worker: int) -> _Read:
    """Read a tensor of both checkpoints, and encode its change."""
    base, tuned = pair.base, pair.tuned
    if name not in tuned.tensors:
        return _Read(base.digest(name), None, ())
    spec, blocks = pair.specs[name], []
    form = spec.form
    whole = None if spec.origin == form else pair.base_bits(spec)  # converted
    digest_before = begin_digest(name, form) if whole is None else None
    digest_after = begin_digest(name, form)
    for number, (start, stop) in enumerate(form.blocks()):
        before = base.bits(name, start, stop) if whole is None else whole[start:stop]
        after = tuned.bits(name, start, stop)
        if digest_before is not None:
            digest_before.update(before.view(np.uint8).data)
        digest_after.update(after.view(np.uint8).data)
        change = pair.between(spec, before, after)
        block, data = encode(tuned.name, pair.kind, spec, number, change, before, codec)
        with naming(path):
            blocks.append((block, spools.append(worker, data)))
    if digest_before is not None:
        known: str | None = digest_before.hexdigest()
    else:
        known = base.digest(name) if name in base.tensors else None
    return _Read(known, digest_after.hexdigest(), tuple(blocks))
