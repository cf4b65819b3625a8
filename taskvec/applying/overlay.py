"""A checkpoint with a task vector applied in memory, used as the start of training or of another vector."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from taskvec_formats import Checkpoint
from taskvec_formats.container import TensorInfo
from taskvec_formats.dtypes import BitArray

from ..vectors.source import inputs_of
from ..vectors.vector import TaskVector
from .verified import Application


class Patched(Checkpoint):
    """The checkpoint base + vector, computed one tensor at a time on demand. Nothing is written.

    Its tensors and its fingerprint are those of the folder that `apply` would write. Shards and side files are the
    base's.

    Args:
        base: The base.
        vector: A vector or a patch.

    Raises:
        BaseMismatchError: The vector does not fit the base.
    """

    def __init__(self, base: Checkpoint, vector: TaskVector) -> None:
        self.path, self.name = base.path, f"{base.name} + {vector.name}"
        self.shards, self.side_files, self.left_out = base.shards, base.side_files, base.left_out
        self._base = base  # may itself be a Patched
        self._vector = vector
        self._application = Application(vector, base)
        tensors = {name: info for name, info in base.tensors.items() if name not in vector.header.removed}
        tensors |= {
            name: TensorInfo.computed(spec.form) for name, spec in vector.specs.items() if spec.origin != spec.form
        }
        self.tensors = dict(sorted(tensors.items()))

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files and folders that the base and the vector read."""
        return inputs_of(self._base, self._vector)

    def bits(self, name: str, start: int = 0, stop: int | None = None) -> BitArray:
        """Return the elements [start, stop) of a tensor as a flat array of carriers."""
        spec = self._vector.specs.get(name)
        if spec is None:
            return self._base.bits(name, start, stop)
        stop = spec.size if stop is None else stop
        numbers = spec.form.numbers_of(start, stop)
        if not numbers:
            return np.zeros(0, spec.dtype.carrier)
        blocks = np.concatenate([self._application.range(spec, number) for number in numbers])
        first = spec.form.block(numbers[0])[0]
        return blocks[start - first : stop - first]
