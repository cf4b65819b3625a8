"""The dtypes of safetensors, and the numpy types for their bits and their values.

A tensor is passed around as unsigned integers of its item size, its *carrier*, so that no conversion can change a NaN
payload or the sign of a zero. The same bytes are viewed as floats only for arithmetic. bf16 and fp8, which numpy lacks,
come from `ml_dtypes`.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

BitArray = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class DType:
    """One safetensors dtype.

    Attributes:
        name: Name in safetensors, for example "BF16".
        itemsize: Bytes per element.
        float_name: Name of the numpy or `ml_dtypes` type of the values. None if a difference of two values is not a
            meaningful update (integers, booleans, complex numbers, bare exponents).
        mantissa: Number of stored mantissa bits, None if `float_name` is None. The exponent is above them, the sign is
            the highest bit.
    """

    name: str
    itemsize: int
    float_name: str | None = None
    mantissa: int | None = None

    @property
    def additive(self) -> bool:
        """Whether tuned − base is a number that can be stored, scaled and added."""
        return self.float_name is not None

    @property
    def carrier(self) -> np.dtype[Any]:
        """The unsigned little-endian integer type of this item size."""
        return np.dtype(f"<u{self.itemsize}")

    @cached_property
    def real(self) -> np.dtype[Any]:
        """The floating-point type of the values.

        Raises:
            TypeError: `additive` is False.
        """
        if self.float_name is None:
            raise TypeError(f"{self.name} values are not real numbers that can be added")
        if self.float_name.startswith("<f"):
            return np.dtype(self.float_name)
        import ml_dtypes  # imported late because it takes 0.1 s

        real: np.dtype[Any] = np.dtype(getattr(ml_dtypes, self.float_name))
        return real

    @property
    def compute(self) -> np.dtype[Any]:
        """The type in which base + delta is computed before rounding to `real`: f64 for F64, else f32."""
        return np.dtype(np.float64 if self.name == "F64" else np.float32)

    def narrowed(self, values: Any) -> Any:
        """Round f32 values to this dtype, to nearest with ties to even, and return them in f32.

        Values of a dtype with at least the precision of f32 are returned unchanged.
        """
        return values if self.itemsize >= 4 else values.astype(self.real).astype(np.float32)


DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        DType("F64", 8, "<f8", 52),
        DType("F32", 4, "<f4", 23),
        DType("F16", 2, "<f2", 10),
        DType("BF16", 2, "bfloat16", 7),
        DType("F8_E4M3", 1, "float8_e4m3fn", 3),
        DType("F8_E5M2", 1, "float8_e5m2", 2),
        DType("F8_E8M0", 1),
        DType("C64", 8),
        DType("I64", 8),
        DType("U64", 8),
        DType("I32", 4),
        DType("U32", 4),
        DType("I16", 2),
        DType("U16", 2),
        DType("I8", 1),
        DType("U8", 1),
        DType("BOOL", 1),
    )
}
