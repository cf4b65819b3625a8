"""Time of `taskvec train --mask lift` for choosing a mask, by the shape of the weight matrices.

Usage: python benchmarks/masks.py. The matrices are random, as the time does not depend on the values.
"""

from __future__ import annotations

import time

import numpy as np

from taskvec.models.low_rank import low_rank
from taskvec.training.options import TrainingOptions

SHAPES = ((192, 576), (576, 576), (576, 1536), (2048, 8192), (4096, 4096), (4096, 11008))
SMOLLM2 = {(192, 576): 60, (576, 576): 60, (576, 1536): 90}  # shape -> number of matrices


def seconds(shape: tuple[int, int]) -> float:
    """Time of one core for the factors of a matrix and for the four times that scores are computed from them."""
    matrix = np.random.default_rng(0).standard_normal(shape, np.float32)
    began = time.process_time()
    factors = low_rank(matrix, TrainingOptions.mask_rank)
    for _ in range(4):
        factors.product()
    return time.process_time() - began


def main() -> None:
    """Print the times as a table."""
    found = {shape: seconds(shape) for shape in SHAPES}
    print("| matrices | seconds |\n|---|---|")
    for (rows, columns), each in found.items():
        print(f"| {rows:,} × {columns:,} | {each:.2f} |")
    print(
        f"| the {sum(SMOLLM2.values())} of SmolLM2-135M | {sum(n * found[shape] for shape, n in SMOLLM2.items()):.0f} |"
    )


if __name__ == "__main__":
    main()
