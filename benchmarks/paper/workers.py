"""What worker processes do: each computes rows in one thread, so that results do not depend on the number of cores."""

from __future__ import annotations

import gc
import traceback
from importlib import import_module
from pathlib import Path

import torch

from taskvec.devices import device_of

from .compute import Lab
from .store import Store
from .tables import Row
from .worlds import Place

_HEAVY = ("peft", "taskvec.training.dense", "taskvec.training.ticket", "taskvec.evaluation.evaluate")
MATMUL_PRECISION = "high"  # of f32 on an accelerator: TF32
_labs: list[Lab] = []  # of this worker


def set_up(place: Place, results: Path, head: int) -> None:
    """Prepare this process."""
    torch.set_num_threads(1)
    if device_of("auto").type != "cpu":
        torch.set_float32_matmul_precision(MATMUL_PRECISION)
    for name in _HEAVY:
        import_module(name)
    gc.collect()
    gc.freeze()  # each phase of training collects garbage, which takes half a second with all imported modules
    _labs[:] = [Lab(place, Store(results), head)]


def compute(row: Row) -> str | None:
    """Compute a row. Returns the error if it cannot be computed."""
    (lab,) = _labs
    try:
        setting = None if row.spec is None else lab.choose(row.spec)
        for seed in (0,) if row.spec is None else lab.world.seeds:
            for task in row.report:
                lab.test(row.spec, setting, seed, task)
    except Exception:
        return traceback.format_exc()
    return None
