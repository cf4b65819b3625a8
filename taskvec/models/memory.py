"""A checkpoint of tensors in memory."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from pathlib import Path

from taskvec_formats import Checkpoint
from taskvec_formats.container import TensorInfo


class MemoryCheckpoint(Checkpoint, ABC):
    """A checkpoint without files.

    Args:
        name: The name for display.
        tensors: Tensor name -> description, in the order of the names.
    """

    def __init__(self, name: str, tensors: Mapping[str, TensorInfo]) -> None:
        self.path, self.name = Path(), name
        self.shards, self.side_files, self.left_out = (), (), ()
        self.tensors = dict(tensors)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """No files are read."""
        return ()

    @property
    def is_folder(self) -> bool:
        """No folder exists."""
        return False
