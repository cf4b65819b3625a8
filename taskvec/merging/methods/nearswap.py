"""NearSwap: move towards a fine-tune where it is near to the base.

Source: https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001.
"""

from typing import Annotated

import numpy as np

from taskvec_formats import SparseTensor

from ...vectors.align import Aligned
from .options import Bounds


def nearswap(vectors: Aligned, *, t: Annotated[float, Bounds(0)] = 0.0001) -> SparseTensor:
    """The change s·τ of one vector with s = t / |τ|, or 1 if |τ| is smaller than t.

    Args:
        vectors: One vector in one range of a tensor. Its weight is not used.
        t: The largest magnitude of a change.
    """
    values = vectors.on_cpu(vectors.parts[0])
    return vectors.result(values * np.clip(np.float32(t) / np.maximum(abs(values), np.float32(1e-6)), 0, 1))
