"""What a training that may be interrupted has finished."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from taskvec_formats.atomic import atomic_file

from ..resume import RecordedFolder
from ..vectors.vector import TaskVector

KIND = "run"


class RunFolder(RecordedFolder):
    """Finished masks and vectors as `.lota` files, and the Trainer's checkpoints of the phase under way."""

    def __init__(self, path: Path | None, record: Mapping[str, Any], *, resume: bool = True) -> None:
        super().__init__(path, KIND, record, resume=resume)

    def vector(self, name: str, make: Callable[[], TaskVector]) -> TaskVector:
        """The vector of that name, made where an earlier run did not finish it."""
        if self.path is None:
            return make()
        file = self.path / f"{name}.lota"
        if self.is_stale or not file.exists():
            made = make()
            self.begin()
            made.save(file)
        return TaskVector.open(file)

    def number(self, name: str, make: Callable[[], float]) -> float:
        """The number of that name, found where an earlier run did not find it."""
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
        """A folder in it, for what is about to begin."""
        path = self.begin()
        return path and path / name
