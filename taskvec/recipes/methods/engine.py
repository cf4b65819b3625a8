"""Merges of whole models: each tensor of the result is a function of the same tensor in all models.

The values of all models are converted to one dtype, in which the result is computed: every operation is computed in f32
(f64 for F64) and rounded to it, as torch does. Sums over a tensor are computed in f64 and rounded once, so they do not
depend on the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from taskvec_formats import Checkpoint, Form
from taskvec_formats.dtypes import BitArray, DType

from ...applying.rounding import round_to
from ...errors import MergeError

Values = npt.NDArray[Any]


def rounded(dtype: DType, values: Any) -> Any:
    """Round values to a dtype, to nearest with ties to even.

    Args:
        dtype: A floating-point dtype.
        values: An array or a number.

    Returns:
        The values, in f64 for F64, otherwise in f32.
    """
    return dtype.narrowed(np.asarray(values, dtype.compute))


@dataclass(frozen=True)
class Group:
    """The values of a tensor in several models, in one range.

    Attributes:
        inputs: One array per model, [n], rounded to `dtype`.
        base: The index of the base among them, or None.
        dtype: The dtype in which the result is computed.
        numbers: The parameters of the method: a value for all models, or a list with one per model.
        start: The place of the range in the tensor.
    """

    inputs: Sequence[Values]
    base: int | None
    dtype: DType
    numbers: Mapping[str, Any]
    start: int = 0

    def r(self, values: Any) -> Any:
        """Round values to `dtype`."""
        return rounded(self.dtype, values)

    @property
    def others(self) -> list[int]:
        """The indices of the models that are not the base."""
        return [i for i in range(len(self.inputs)) if i != self.base]

    @cached_property
    def deltas(self) -> list[Values]:
        """The models that are not the base, minus the base if there is one."""
        if self.base is None:
            return list(self.inputs)
        return [self.r(self.inputs[i] - self.inputs[self.base]) for i in self.others]

    def on_base(self, values: Values) -> Values:
        """Add values to the base, if there is one."""
        found: Values = values if self.base is None else self.r(self.inputs[self.base] + values)
        return found


@dataclass(frozen=True)
class WholeTensor:
    """A tensor in several models, read range by range.

    Attributes:
        name: Its name in the result.
        form: Its shape, and the dtype in which it is computed.
        inputs: The models, and its name in each of them.
        base: The index of the base among them, or None.
        numbers: The parameters of the method for this tensor.
    """

    name: str
    form: Form
    inputs: Sequence[tuple[Checkpoint, str]]
    base: int | None
    numbers: Mapping[str, Any]

    @property
    def row(self) -> int:
        """The number of elements of a row; a tensor with one dimension is one row."""
        return self.form.shape[-1] if self.form.shape else 1

    def group(self, start: int, stop: int) -> Group:
        """Read the elements [start, stop) of every model.

        Raises:
            DTypeError: A finite value is beyond the range of the dtype.
        """
        found = []
        for checkpoint, name in self.inputs:
            own = checkpoint.tensors[name].dtype
            values = checkpoint.bits(name, start, stop).view(own.real).astype(own.compute)
            if own != self.form.dtype:
                values = round_to(self.form.dtype, values, self.name)
            found.append(values.astype(self.form.dtype.compute))
        return Group(found, self.base, self.form.dtype, self.numbers, start)

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """Return the ranges of whole rows, of bounded size, that overlap [start, stop)."""
        size = self.form.size
        if len(self.form.shape) < 2:
            return iter([(0, size)] if size else [])
        return self.form.blocks_of(start, size if stop is None else stop)

    def groups(self) -> Iterator[Group]:
        """Read the whole tensor, one block of whole rows at a time."""
        for block in self.blocks():
            yield self.group(*block)

    def total(self, of: Callable[[Group], Any]) -> Any:
        """Return the sum of a function over all blocks, in f64."""
        return sum(of(group) for group in self.groups())


@dataclass(frozen=True)
class Function:
    """A merge method on whole models.

    Attributes:
        combine: (a range of the models, the result of `measure`) -> the values of the result.
        measure: What has to be known of the whole tensor before any range is combined. None if nothing has to be.
        by_block: Whether ranges must be whole blocks, because rows are combined as a whole.
        is_large: Whether `measure` returns as much data as the tensor. It is discarded after the last range.
    """

    combine: Callable[[Group, Any], Values]
    measure: Callable[[WholeTensor], Any] | None = None
    by_block: bool = False
    is_large: bool = False


class Computed:
    """A tensor of a merge of whole models, computed range by range on demand.

    Args:
        tensor: The tensor in the models.
        function: The merge method.
    """

    def __init__(self, tensor: WholeTensor, function: Function) -> None:
        self._tensor = tensor
        self._function = function
        self._lock = Lock()
        self._measured: Any = None

    def __call__(self, start: int, stop: int) -> BitArray:
        """Return the elements [start, stop) as carriers.

        Raises:
            MergeError: A value that is finite in all models would not be finite.
            DTypeError: A value is beyond the range of the dtype.
        """
        if start >= stop:
            return np.zeros(0, self._tensor.form.dtype.carrier)
        if not self._function.by_block:
            return self._range(start, stop)
        blocks = list(self._tensor.blocks(start, stop))
        found = np.concatenate([self._range(*block) for block in blocks])
        return found[start - blocks[0][0] : stop - blocks[0][0]]

    def _range(self, start: int, stop: int) -> BitArray:
        tensor = self._tensor
        group = tensor.group(start, stop)
        with np.errstate(all="ignore"):
            values = self._function.combine(group, self._known(last=stop == tensor.form.size))
        finite = np.logical_and.reduce([np.isfinite(each) for each in group.inputs])
        if not np.isfinite(values[finite]).all():
            said = f"the result leaves the range of {tensor.form.dtype.name}"
            if not all(np.isfinite(each).all() for part in tensor.groups() for each in part.inputs):
                said = "some models have NaN or infinite weights, which would make finite ones NaN"
            raise MergeError(f"tensor {tensor.name!r}: {said}")
        result = round_to(tensor.form.dtype, values, tensor.name)
        found: BitArray = np.ascontiguousarray(result).view(tensor.form.dtype.carrier)
        return found

    def _known(self, *, last: bool) -> Any:
        if self._function.measure is None:
            return None
        with self._lock:
            known = self._measured
            if known is None:
                try:
                    with np.errstate(all="ignore"):
                        known = self._function.measure(self._tensor)
                except MergeError as error:
                    raise MergeError(f"tensor {self._tensor.name!r}: {error}") from None
            self._measured = None if last and self._function.is_large else known
            return known
