"""A checkpoint with a task vector on it, as a checkpoint: the start of a training that builds on an earlier one."""

from __future__ import annotations

import numpy as np

from taskvec_formats import Checkpoint
from taskvec_formats.dtypes import BitArray

from .apply import Application
from .errors import BaseMismatchError
from .tensor import as_bytes
from .vector import TaskVector


class Patched(Checkpoint):
    """base + vector, computed a tensor at a time when asked for; nothing is written.

    Its fingerprint is that of the folder which `apply` would write. Raises BaseMismatchError where the vector does not
    fit the base, or adds, removes, resizes or retypes a tensor, for which the base's model has no room.
    """

    def __init__(self, base: Checkpoint, vector: TaskVector) -> None:
        super().__init__(base.path, f"{base.name} + {vector.name}")
        reformed = [name for name, spec in vector.specs.items() if spec.origin != spec.form]
        for name in (*reformed, *vector.header.removed):
            raise BaseMismatchError(
                f"{vector.name} changes the form of tensor {name!r}: unpack it and train from there"
            )
        self._base = base  # itself perhaps one of these
        self._vector = vector
        self._application = Application(vector, base)

    def bits(self, name: str) -> BitArray:
        """A tensor as a flat array of carriers, [size]: mapped where the vector leaves it alone, else new."""
        spec = self._vector.specs.get(name)
        if spec is None or not spec.size:
            return self._base.bits(name)
        return np.concatenate([self._application.range(spec, number) for number in range(spec.form.block_count)])

    def bytes(self, name: str) -> memoryview:
        """The raw bytes of a tensor."""
        return as_bytes(self.bits(name)) if name in self._vector.specs else self._base.bytes(name)

    def release(self, name: str) -> None:
        """Give back the memory of a tensor's pages."""
        self._base.release(name)
