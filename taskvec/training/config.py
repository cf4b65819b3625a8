"""Options of a run from a file: YAML, or the record that a run stores in its `.lota` file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from taskvec_formats import Checkpoint

from ..arguments import shown
from ..data.sources import read_tables
from ..documents import read_document
from ..errors import UsageError
from ..vectors.vector import TaskVector
from .options import AUTO

# (a, b): if the command line gives option a, option b of a file is ignored
RIVALS = (("steps", "epochs"), ("calibration_steps", "calibration_epochs"), ("eval_data", "eval_split"))


def _number(value: object) -> object:
    if isinstance(value, str):
        return float(value)  # YAML reads 1e-4, without a decimal point, as text
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    raise ValueError


def _of(kind: type) -> Callable[[object], object]:
    def check(value: object) -> object:
        if type(value) is not kind:
            raise ValueError
        return value

    return check


def _numbers(value: object) -> object:
    return [_number(each) for each in (value if isinstance(value, list) else [value])]


def _texts(value: object) -> object:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str) for each in values):
        raise ValueError
    return values


# kind -> its name in messages, and a function that converts a value or raises ValueError
_KINDS: dict[str, tuple[str, Callable[[object], object]]] = {
    "int": ("a whole number", _of(int)),
    "float": ("a number", _number),
    "rate": ("a number or auto", lambda value: value if value == AUTO else _number(value)),
    "bool": ("true or false", _of(bool)),
    "str": ("text", _of(str)),
    "list": ("a list of texts", _texts),
    "numbers": ("a list of numbers", _numbers),
}


@dataclass(frozen=True)
class Config:
    """Options of a file.

    Attributes:
        path: The file.
        settings: Option -> value, with underscores. Options that the file does not give, or gives as null, are left
            out.
        record: The record of the run if the file is a `.lota` file, else None.
    """

    path: Path
    settings: Mapping[str, Any]
    record: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, path: Path, kinds: Mapping[str, str], apart: Collection[str] = ()) -> Config:
        """Read a YAML file, or a `.lota` file if the name ends so.

        Args:
            path: The file.
            kinds: Option -> "int", "float", "rate", "bool", "str", "list" (of strings) or "numbers".
            apart: Options that can only be given on the command line. They are ignored in a record and refused in YAML.

        Raises:
            UsageError: A key is unknown or given twice, a value has the wrong type, or a `.lota` file contains no
                record. The message names file and key.
            FormatError: The `.lota` file cannot be read.
        """
        if path.suffix == ".lota":
            record = _record_of(path)
            options = {key: value for key, value in record["options"].items() if key not in apart}
            return cls(path, _settings(path, options, kinds, ()), record)
        try:
            document = read_document(path)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        if not isinstance(document, dict):
            raise UsageError(f"{path}: expected a mapping of options, such as lr: 0.001, found {shown(document)}")
        return cls(path, _settings(path, document, kinds, apart))

    def check_given(self, **given: object) -> None:
        """Check that every file that the recorded run read is given again.

        Args:
            **given: mask_from, disjoint_from, start_from, eval_data and mix, as on the command line.

        Raises:
            UsageError: One of them is missing.
        """
        if self.record is None:
            return
        evaluated, mixed = (_files(self.record, use) for use in ("eval_data", "mix"))
        recorded = {
            "mask_from": self.record.get("mask_from"),
            "disjoint_from": self.record.get("disjoint_from"),
            "start_from": self.record.get("start_from"),
            "eval_data": [file.get("name") for file in evaluated],
            "mix": [file.get("name") for file in mixed],
        }
        for option, name in recorded.items():
            if name and not given[option]:
                names = [each.get("name") if isinstance(each, dict) else each for each in _listed(name)]
                raise UsageError(
                    f"{self.path}: the run had `{option}={shown(', '.join(map(str, names)))[1:-1]}`: "
                    "the record contains no paths, so give it again"
                )

    def differences(
        self,
        base: Checkpoint,
        data: Path,
        *,
        mask_from: TaskVector | None,
        disjoint_from: Sequence[TaskVector],
        start_from: TaskVector | None,
        mix: Sequence[tuple[Path, float]],
        eval_data: Path | None,
    ) -> list[str]:
        """Differences between a run and the recorded one, other than options.

        Files are compared by their contents, packages by their versions. Reads the whole base.

        Args:
            base: The base of the run.
            data: Its data.
            mask_from: As in `train`.
            disjoint_from: As in `train`.
            start_from: As in `train`.
            mix: As in `train`.
            eval_data: As in `train`.

        Returns:
            One sentence per difference; empty if there is no record.
        """
        if self.record is None:
            return []
        found = []
        if self.record.get("base") != base.fingerprint:
            found.append(f"the base is another one: {base.name} has other weights")
        found += _other_files("data", _files(self.record, "data"), data)
        found += _other_files("`eval_data`", _files(self.record, "eval_data"), eval_data)
        shares = _listed(self.record.get("mix"))
        if len(shares) != len(mix):
            found.append(f"`mix` was given {len(shares)} times, here {len(mix)}")
        for number, (share, (path, given)) in enumerate(zip(shares, mix, strict=False)):
            found += _other_files("`mix`", _files(self.record, "mix", number), path)
            if share != given:
                found.append(f"the share of {path} was {shown(share)}, here it is {given}")
        for option, was, now in (
            ("`mask_from`", _listed(self.record.get("mask_from")), [] if mask_from is None else [mask_from]),
            ("`disjoint_from`", _listed(self.record.get("disjoint_from")), list(disjoint_from)),
            ("`start_from`", _listed(self.record.get("start_from")), [] if start_from is None else [start_from]),
        ):
            if [_get(each, "digest") for each in was] != [vector.digest for vector in now]:
                found.append(f"{option} was another vector, or in another order")
        versions = self.record.get("versions")
        for package, was in (versions if isinstance(versions, dict) else {}).items():
            if was != (now_installed := _version(package)):
                found.append(f"{shown(package)[1:-1]} was {shown(was)[1:-1]}, here it is {now_installed}")
        return found


def _record_of(path: Path) -> dict[str, Any]:
    record = TaskVector.open(path).provenance.get("run")
    if not isinstance(record, dict) or not isinstance(record.get("options"), dict):
        raise UsageError(f"{path} contains no record of a run: expected a .lota file that taskvec train wrote")
    return record


def _settings(
    path: Path, document: Mapping[str, object], kinds: Mapping[str, str], apart: Collection[str]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in document.items():
        name = key.replace("-", "_")
        if name in apart:
            raise UsageError(f"{path}: {shown(key)} cannot be set in a file: give `{name}` on the command line")
        if name not in kinds:
            near = get_close_matches(name, kinds, 1)
            hint = f"; did you mean {near[0].replace('_', '-')}?" if near else ""
            raise UsageError(f"{path}: unknown key {shown(key)}, expected an option of taskvec train{hint}")
        if name in found:
            raise UsageError(f"{path}: {shown(key)} is given twice, with a hyphen and with an underscore")
        what, make = _KINDS[kinds[name]]
        try:
            found[name] = None if value is None else make(value)
        except (ValueError, OverflowError):
            raise UsageError(f"{path}: {shown(key)[1:-1]} must be {what}, found {shown(value)}") from None
    return {name: value for name, value in found.items() if value is not None and value != []}


def _listed(value: object) -> list[Any]:
    """A record's value as a list: it stores one item without a list, and none as null."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _get(entry: object, key: str) -> object:
    return entry.get(key) if isinstance(entry, dict) else None


def _files(record: Mapping[str, Any], use: str, number: int | None = None) -> list[Mapping[str, Any]]:
    """Recorded files of a use; number: only those of this `mix`."""
    files: list[Mapping[str, Any]] = [file for file in _listed(record.get("data")) if _get(file, "use") == use]
    return files if number is None else [file for file in files if file.get("number") == number]


def _other_files(what: str, recorded: list[Mapping[str, Any]], path: Path | None) -> list[str]:
    if path is None:
        return []
    if not recorded:
        return [f"{what} {path} is read, but was not given to the recorded run"]
    digests = [table.record.get("sha256") for table in read_tables(path)]
    if [file.get("sha256") for file in recorded] == digests:
        return []
    if len(recorded) != len(digests):
        return [f"{what} was {len(recorded)} files, {path} is {len(digests)}"]
    file, digest = next(pair for pair in zip(recorded, digests, strict=True) if pair[0].get("sha256") != pair[1])
    name, was = (shown(file.get(key))[1:-1] for key in ("name", "sha256"))
    return [f"{what} was {name} with SHA-256 {was[:12]}, {path} has {str(digest)[:12]}"]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except (PackageNotFoundError, ValueError):
        return None
