"""The folder of a run that may be interrupted: what it was asked for, and how far it came."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from taskvec_formats.atomic import atomic_file

from ..errors import TrainingError
from ..vector import TaskVector

RECORD = "run.json"


class RunFolder:
    """`run.json`, finished masks and vectors as `.lota` files, and the Trainer's checkpoints of the phase under way.

    path: None keeps nothing. record: what makes this run the one it is, as JSON.
    Raises TrainingError where the folder holds another run.
    """

    def __init__(self, path: Path | None, record: dict[str, Any]) -> None:
        self.path = path
        self._record = json.loads(json.dumps(record))
        if path is None:
            return
        try:
            found = json.loads((path / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except ValueError:
            raise TrainingError(f"{path / RECORD} is not the record of a run") from None
        _compare(path, found, self._record)

    def _begin(self) -> Path | None:
        """The folder, with its record: made when there is something to keep."""
        if self.path and not (self.path / RECORD).exists():
            self.path.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.path / RECORD) as temporary:
                temporary.write_text(json.dumps(self._record, indent=1) + "\n", encoding="utf-8")
        return self.path

    def vector(self, name: str, make: Callable[[], TaskVector]) -> TaskVector:
        """The vector of that name, made where an earlier run did not finish it."""
        if self.path is None:
            return make()
        file = self.path / f"{name}.lota"
        if not file.exists():
            made = make()
            self._begin()
            made.save(file)
        return TaskVector.open(file)

    def below(self, name: str) -> Path | None:
        """A folder in it, for what is about to begin."""
        path = self._begin()
        return path and path / name


def _compare(path: Path, found: Any, record: Any, what: str = "") -> None:
    """Raise TrainingError, naming it, at the first item in which two records differ."""
    if isinstance(found, dict) and isinstance(record, dict):
        for key in sorted(found.keys() | record.keys()):
            _compare(path, found.get(key), record.get(key), f"{what} {key}" if what else key)
    elif found != record:
        raise TrainingError(f"{path} holds another run: its {what} was {found}, here it is {record}")
