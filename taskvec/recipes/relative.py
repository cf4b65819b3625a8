"""The result of a merge file as a task vector relative to one of its models."""

from __future__ import annotations

from collections.abc import Mapping

from taskvec_formats import Change, Checkpoint, Header, Identity, TensorSpec
from taskvec_formats.checkpoint import short
from taskvec_formats.forms import Bits

from ..errors import UsageError
from ..reporting.progress import Progress, silent
from ..reporting.throughput import hashed
from ..vectors.delta import BaseBits, diff_range
from ..vectors.promotion import WidenedEntries
from ..vectors.source import inputs_of
from ..vectors.vector import TaskVector
from .assembled import Assembled
from .result import Result


def relative_to(start: Checkpoint, result: Result, progress: Progress = silent) -> TaskVector:
    """Return the vector from a model to a result with the same tensors, computed when it is read or saved.

    Args:
        start: The model.
        result: The result of a merge file, with a model.
        progress: Called while the model is read.

    Raises:
        UsageError: The result has other tensors, or tensors of other shapes.
    """
    model = result.model
    assert model is not None
    for name in sorted(model.tensors.keys() | start.tensors.keys()):
        one, other = (each.tensors[name].shape if name in each.tensors else None for each in (start, model))
        if one != other:
            raise UsageError(
                f"the result has tensor {name!r} as {_said(other)}, and {start.name} has it as {_said(one)}: write a "
                "model folder instead of a .lota file"
            )
    digests = hashed(start, "base", progress)
    specs = {
        name: TensorSpec(name, info.dtype, info.shape, start.tensors[name].form, base=short(digests[name]))
        for name, info in model.tensors.items()
        if info.dtype.additive
    }
    header = Header("vector", Identity(start.name, start.fingerprint), None, tensors=(), provenance=result.provenance)
    return TaskVector(header, specs.values(), _Towards(start, model, specs), model.name, start)


def _said(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


class _Towards(WidenedEntries):
    """The Source of the difference between a model and a computed one."""

    def __init__(self, start: Checkpoint, model: Assembled, specs: Mapping[str, TensorSpec]) -> None:
        super().__init__([], specs, start)
        self.inputs = inputs_of(start, model)
        self._model = model
        self._specs = specs
        self._bits = BaseBits(start)

    def change(self, name: str, start: int, stop: int, base: Bits | None = None) -> Change:
        spec = self._specs[name]
        before = (self._bits(spec) if base is None else base)[start:stop]
        return diff_range(spec.dtype, before, self._model.bits(name, start, stop))
