"""The folder of work that may be interrupted: what was asked for, so that nothing else goes on in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taskvec_formats.atomic import atomic_file

from .errors import ResumeError

RECORD = "run.json"


class RecordedFolder:
    """A folder with `run.json` in it, which is written before anything else.

    path: None keeps nothing. record: what makes this run the one it is, as JSON.
    Raises ResumeError where the folder holds another run, or files of which nothing is said.
    """

    def __init__(self, path: Path | None, record: Mapping[str, Any]) -> None:
        self.path = path
        self._record = json.loads(json.dumps(record))
        if path is None:
            return
        try:
            found = json.loads((path / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            # a run may have been killed while it wrote the record, under a temporary name
            if path.is_dir() and any(not file.name.startswith(f".{RECORD}.") for file in path.iterdir()):
                raise ResumeError(f"{path} holds files, but no record of the run that they belong to") from None
            return
        except ValueError:
            raise ResumeError(f"{path / RECORD} is not the record of a run") from None
        _compare(path, found, self._record)

    def begin(self) -> Path | None:
        """The folder, with its record: made when there is something to keep."""
        if self.path and not (self.path / RECORD).exists():
            self.path.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.path / RECORD) as temporary:
                temporary.write_text(json.dumps(self._record, indent=1) + "\n", encoding="utf-8")
        return self.path


def _compare(path: Path, found: Any, record: Any, what: str = "") -> None:
    """Raise ResumeError, naming it, at the first item in which two records differ."""
    if isinstance(found, dict) and isinstance(record, dict):
        for key in sorted(found.keys() | record.keys()):
            _compare(path, found.get(key), record.get(key), f"{what} {key}" if what else key)
    elif found != record:
        raise ResumeError(f"{path} holds another run: its {what} was {found}, here it is {record}")
