"""Folder with the finished parts of a training run, from which the run is resumed after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from taskvec_formats.system.atomic import atomic_file

from ..resume import RecordedFolder
from ..vectors.vector import TaskVector

KIND = "run"


class RunFolder(RecordedFolder):
    """Finished masks and vectors as `.lota` files, numbers as JSON, and Trainer's checkpoints of the current phase."""

    def __init__(self, path: Path | None, record: Mapping[str, Any], *, resume: bool = True) -> None:
        super().__init__(path, KIND, record, resume=resume)

    def vector(self, name: str, make: Callable[[], TaskVector]) -> TaskVector:
        """Return a vector of the folder. If there is none yet, make and save it.

        Args:
            name: Its name in the folder.
            make: Makes the vector.
        """
        if self.path is None:
            return make()
        file = self.path / f"{name}.lota"
        if self.is_stale or not file.exists():
            made = make()
            self.begin()
            made.save(file)
        return TaskVector.open(file)

    def number(self, name: str, make: Callable[[], float]) -> float:
        """Return a number of the folder. If there is none yet, make and save it.

        Args:
            name: Its name in the folder.
            make: Makes the number.
        """
        if self.path is None:
            return make()
        file = self.path / f"{name}.json"
        if self.is_stale or not file.exists():
            made = make()
            self.begin()
            with atomic_file(file) as temporary:
                temporary.write_text(json.dumps(made) + "\n", encoding="utf-8")
        return float(json.loads(file.read_text(encoding="utf-8")))

    def below(self, name: str) -> Path | None:
        """Path of a subfolder, for a phase that is about to begin; None if nothing is stored."""
        path = self.begin()
        return path and path / name
