"""Folder with the finished parts of a training run, from which the run is resumed after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec_formats.system.atomic import atomic_file

from ..errors import TrainingError
from ..reporting.progress import Progress, silent
from ..resume import RECORD, RecordedFolder
from ..vectors.vector import TaskVector

if TYPE_CHECKING:
    from .processes import Processes
    from .writing import Owned

KIND = "run"


class RunFolder(RecordedFolder):
    """Finished masks and vectors as `.lota` files, numbers as JSON, and checkpoints of the current phase.

    All processes of a run use the same folder. The first one locks it and writes its record.

    Args:
        path: The folder; None keeps nothing, and needs a process by itself.
        record: The parameters that identify this run, as JSON.
        resume: Whether to continue with the content of the folder.
        processes: The processes of the run; None is this process alone.
    """

    def __init__(
        self,
        path: Path | None,
        record: Mapping[str, Any],
        *,
        resume: bool = True,
        processes: Processes | None = None,
    ) -> None:
        from .processes import Processes  # imports torch, which those who need KIND alone do not

        self._processes = processes or Processes()
        self._folder = path
        with self._processes.agreeing():
            super().__init__(path if self._processes.is_first else None, KIND, record, resume=resume)

    def vector(
        self, name: str, make: Callable[[], TaskVector], owned: Owned | None = None, progress: Progress = silent
    ) -> TaskVector:
        """Return a vector of the folder. If there is none yet, make and save it.

        Args:
            name: Its name in the folder.
            make: Makes the vector.
            owned: As in `write_together`, if each process makes a part of the vector; None if all make all of it.
            progress: Called while the vector is written.
        """
        if self._folder is None:
            return make()
        file = self._folder / f"{name}.lota"
        if self._lacks(file):
            made = make()
            self.start()
            if owned is None or self._processes.count == 1:
                self._processes.first(lambda: made.save(file, progress, force=True))
            else:
                from .writing import write_together

                write_together(made, file, owned, self._processes, progress)
        with self._processes.agreeing():
            return TaskVector.open(file)

    def _lacks(self, file: Path) -> bool:
        return self._processes.first(lambda: self.is_stale or not file.exists())

    def start(self) -> None:
        """Create the folder if there is none, and check that all processes see it.

        Raises:
            TrainingError: A process does not see the folder.
        """
        folder = self._processes.first(self.begin)
        with self._processes.agreeing():
            if folder is not None and not (folder / RECORD).exists():
                raise TrainingError(
                    f"{folder} is not on a file system that this process shares with the first one: all processes "
                    "read and write the folder of the run"
                )

    def number(self, name: str, make: Callable[[], float]) -> float:
        """Return a number of the folder. If there is none yet, make and save it.

        Args:
            name: Its name in the folder.
            make: Makes the number.
        """
        if self._folder is None:
            return make()
        file = self._folder / f"{name}.json"
        if self._lacks(file):
            made = make()
            self.start()
            self._processes.first(lambda: _write(file, made))
        return self._processes.first(lambda: float(json.loads(file.read_text(encoding="utf-8"))))

    def below(self, name: str) -> Path | None:
        """Path of a subfolder, for a phase that is about to begin; None if nothing is stored."""
        self.start()
        return self._folder and self._folder / name


def _write(file: Path, number: float) -> None:
    with atomic_file(file) as temporary:
        temporary.write_text(json.dumps(number) + "\n", encoding="utf-8")
