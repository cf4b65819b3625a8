"""Detection of launchers of several processes, such as torchrun. Importing this module does not import torch."""

from __future__ import annotations

import os
import sys


def launched() -> int:
    """Return the number of processes that a launcher has started for this run; 1 if there is none."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_world_size())
    count = os.environ.get("WORLD_SIZE", "")
    return int(count) if "LOCAL_RANK" in os.environ and count.isdecimal() and int(count) else 1


def rank() -> int:
    """Return the number of this process among them, as the launcher says."""
    number = os.environ.get("RANK", "")
    return int(number) if number.isdecimal() else 0
