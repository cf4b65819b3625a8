"""The dtypes in which the tensors of a merge file are computed."""

from __future__ import annotations

from collections.abc import Sequence

from taskvec_formats import Checkpoint
from taskvec_formats.dtypes import DTYPES, DType

from ..applying.output import TARGETS
from ..errors import MergeError
from ..vectors.promotion import promoted
from .recipe import Recipe
from .references import Models


class Forms:
    """The dtypes in which tensors are computed.

    Args:
        recipe: The merge file.
        models: Its models.
        start: The model that the result is relative to.
        within: A dtype for all tensors, or None.
    """

    def __init__(self, recipe: Recipe, models: Models, start: Checkpoint, within: str | None) -> None:
        self._within = DTYPES[TARGETS[within]] if within else None
        self._models = {each.model: models[each.model].checkpoint for each in recipe.sources}
        self._start = start

    def of(self, inputs: Sequence[tuple[Checkpoint, str]]) -> DType:
        """Return the dtype in which a tensor is computed.

        Args:
            inputs: The models, and the name of the tensor in each of them.

        Raises:
            MergeError: There is no dtype that holds the values of all models.
        """
        dtype = inputs[0][0].tensors[inputs[0][1]].dtype
        if not dtype.additive:
            return dtype
        if self._within is not None:
            return self._within
        for checkpoint, name in inputs[1:]:
            other = promoted(dtype, checkpoint.tensors[name].dtype)
            if other is None:
                found = checkpoint.tensors[name].dtype.name
                raise MergeError(f"tensor {name!r} is {dtype.name} and {found}: no dtype holds the values of both")
            dtype = other
        return dtype

    def narrow(self) -> dict[str, DType]:
        """Return the tensors that are computed in F16 or BF16, with their dtypes."""
        every = [self._start, *self._models.values()]
        found = {}
        for name in self._start.tensors:
            dtype = self.of([(each, name) for each in every if name in each.tensors])
            if dtype.name in ("F16", "BF16"):
                found[name] = dtype
        return found

    def keeps(self, dtype: str | None) -> bool:
        """Return whether adding deltas to the base and rounding once gives what is computed in these dtypes.

        Args:
            dtype: The dtype in which the result will be written, or None.
        """
        return all(
            self._start.tensors[name].dtype == own and (dtype is None or TARGETS[dtype] == own.name)
            for name, own in self.narrow().items()
        )
