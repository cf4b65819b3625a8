"""Time and size of the parts of an encoded block, for some levels of pcodec.

Usage: python benchmarks/codec.py FILE. FILE is a vector of f32 deltas. A seventh of its tensors are encoded. Columns:
level; for positions, heads and trailing zeros of the values (docs/format.md), nanoseconds of CPU time and bits per
entry. The last line gives the same for whole blocks, which also contain the bits that are stored without compression.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from taskvec import TaskVector
from taskvec_formats.blocks import encode_block
from taskvec_formats.codecs.floats import LOW
from taskvec_formats.codecs.numbers import LEVEL, Unsigned, encode_numbers

LEVELS = (4, 6, 8, 10, 12)
ROUNDS = 3


def cost(encode: Callable[[], int], entries: int) -> str:
    """CPU time, the least of some rounds, and size, both per entry."""
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        size = encode()
        times.append(time.process_time() - start)
    return f"{min(times) / entries * 1e9:.0f} ns, {8 * size / entries:.2f} bits"


def main() -> None:
    vector = TaskVector.open(sys.argv[1])
    blocks = [(vector.specs[name].form, vector.change(name)) for name in list(vector)[::7]]
    indices = [change.delta.indices for _, change in blocks]
    values = np.concatenate([change.delta.values for _, change in blocks]).view(np.uint32)
    low = values & np.uint32((1 << LOW) - 1)
    streams: dict[str, list[Unsigned]] = {
        "positions": [(np.diff(each, prepend=-1) - 1).astype(np.uint64) for each in indices],
        "heads": [values >> np.uint32(LOW) & np.uint32((1 << 31 - LOW) - 1)],
        "zeros": [np.where(low == 0, LOW, np.log2(np.maximum(low & (~low + np.uint32(1)), 1))).astype(np.uint8)],
    }
    print(f"{len(values):,} entries\n\n| level | {' | '.join(streams)} |\n|---|---|---|---|")
    for level in LEVELS:

        def size(name: str, level: int = level) -> int:
            return sum(len(encode_numbers(each, level)) for each in streams[name])

        print(f"| {level} | {' | '.join(cost(partial(size, name), len(values)) for name in streams)} |", flush=True)
    whole = cost(lambda: sum(len(encode_block(*block)[1]) for block in blocks), len(values))
    print(f"\nwhole blocks, level {LEVEL}: {whole}")


if __name__ == "__main__":
    main()
