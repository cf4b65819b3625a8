"""Rounding of tensors to the dtype in which they are written."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from taskvec_formats import Form
from taskvec_formats.dtypes import BitArray, DType

from ..errors import DTypeError
from .output import TARGETS, Output

Values = npt.NDArray[Any]


def rounded(name: str, bits: BitArray, form: Form, output: Output) -> BitArray:
    """Round a range of a tensor to the output dtype.

    Args:
        name: The tensor, for the error message.
        bits: Carriers [n].
        form: The form of the tensor.
        output: How the result is written.

    Returns:
        New carriers [n], or `bits` itself if the dtype does not change.

    Raises:
        DTypeError: A finite value becomes infinite.
    """
    if output.form(form) == form:
        return bits
    return rounded_values(name, bits.view(form.dtype.real).astype(form.dtype.compute, copy=False), form, output)


def rounded_values(name: str, values: Values, form: Form, output: Output) -> BitArray:
    """Round values of a tensor to the output dtype.

    Every NaN becomes the same one, because machines convert NaN payloads differently.

    Args:
        name: The tensor, for the error message.
        values: f32 or f64 [n].
        form: The form of the tensor.
        output: How the result is written.

    Returns:
        New carriers [n].

    Raises:
        DTypeError: A finite value becomes infinite.
    """
    target = output.form(form).dtype
    result = round_to(target, values, name)
    result[np.isnan(values)] = np.nan
    carriers: BitArray = result.view(target.carrier)
    return carriers


def round_to(dtype: DType, values: Values, name: str) -> Values:
    """Round values to a dtype, to nearest with ties to even; f64 is rounded through f32, as in torch.

    Args:
        dtype: A floating-point dtype.
        values: f32 or f64 [n], a range of a tensor.
        name: The name of the tensor, for the error message.

    Returns:
        A new array of values of the dtype.

    Raises:
        DTypeError: A finite value becomes infinite.
    """
    with np.errstate(all="ignore"):
        result: Values = values.astype(dtype.compute, copy=False).astype(dtype.real)
    beyond = np.flatnonzero(np.isinf(result) & np.isfinite(values))
    if len(beyond):
        names = {target: option for option, target in TARGETS.items()}
        raise DTypeError(
            f"tensor {name!r} contains {values[beyond[0]]:g}, which is beyond {names.get(dtype.name, dtype.name)}"
        )
    return result
