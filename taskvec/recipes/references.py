"""The models that a merge file names, opened once each."""

from __future__ import annotations

import os
from dataclasses import dataclass

from taskvec_formats import Checkpoint

from ..applying.overlay import Patched
from ..errors import UsageError
from ..hub.models import open_checkpoint
from ..hub.reference import written
from ..interop.names import adapter_at, check_peft
from ..reporting.progress import Progress, silent
from ..vectors.found import is_vector
from ..vectors.vector import TaskVector


@dataclass(frozen=True)
class Opened:
    """A model of a merge file.

    Attributes:
        checkpoint: The model.
        vector: The vector from the base to the model if the merge file names a `.lota` file or an adapter of the base;
            otherwise None.
    """

    checkpoint: Checkpoint
    vector: TaskVector | None = None


class Models:
    """Opens the models of a merge file.

    Args:
        start: The base of the recipe and its reference, or None. Vectors are applied to it.
        is_base: Whether it is the base_model of the recipe, to which adapters are applied.
        progress: Called while adapters are merged.
    """

    def __init__(
        self, start: Checkpoint | None, reference: str | None, progress: Progress = silent, *, is_base: bool = True
    ) -> None:
        self._start = start
        self._reference = reference
        self._is_base = is_base
        self._progress = progress
        self._opened: dict[str, Opened] = {}

    def __getitem__(self, reference: str) -> Opened:
        """Open a model, or return it if it is open.

        Raises:
            UsageError: The file does not exist, or a vector or an adapter needs a base.
            AdapterError, BaseMismatchError, FormatError, TrainingError: A file is damaged or does not fit.
        """
        if reference not in self._opened:
            self._opened[reference] = self._open(reference)
        return self._opened[reference]

    def _open(self, reference: str) -> Opened:
        if reference == self._reference and self._start is not None:
            return Opened(self._start)
        model, adapter = split(reference)
        if adapter is not None:
            return self._adapted(self[model].checkpoint, adapter)
        if is_vector(reference):
            vector = TaskVector.open(reference)
            return Opened(Patched(self._base(reference, "a task vector"), vector), vector)
        if adapter_at(reference) is not None:
            if not self._is_base:
                raise UsageError(
                    f"{reference} is an adapter of peft: base_model must name its base, or it is written as "
                    "model+adapter"
                )
            return self._adapted(self._base(reference, "an adapter of peft"), reference)
        return Opened(open_checkpoint(reference))

    def _adapted(self, model: Checkpoint, adapter: str) -> Opened:
        checkpoint, vector = adapted(model, adapter, self._progress)
        return Opened(checkpoint, vector if model is self._start else None)

    def _base(self, reference: str, kind: str) -> Checkpoint:
        if self._start is None:
            raise UsageError(f"{reference} is {kind}: base_model must name its base")
        return self._start


def adapted(model: Checkpoint, adapter: str, progress: Progress = silent) -> tuple[Checkpoint, TaskVector]:
    """Merge an adapter of peft into a model.

    Args:
        model: The model that the adapter was trained on.
        adapter: The folder of the adapter, or its repository on the Hub.
        progress: Called while the adapter is merged.

    Returns:
        The model with the adapter, computed when it is read, and the vector between them.

    Raises:
        UsageError: There is no such adapter, or peft is missing.
        AdapterError, FormatError, TrainingError: The adapter is damaged or does not fit.
    """
    folder = adapter_at(adapter)
    if folder is None:
        raise UsageError(f"{written(adapter)}: no such adapter of peft")
    check_peft()
    from ..interop.adapters import read_adapter  # loads torch

    vector = read_adapter(folder, model, progress)
    return Patched(model, vector), vector


def split(reference: str) -> tuple[str, str | None]:
    """Split "model+adapter" into the model and the adapter. The adapter is None if there is none."""
    if "+" not in reference or os.path.exists(reference):
        return reference, None
    model, _, adapter = reference.partition("+")
    if "+" in adapter or not model or not adapter:
        raise UsageError(f"{reference}: expected one adapter, as in model+adapter")
    return model, adapter
