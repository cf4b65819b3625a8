"""Which files of a tuned folder travel in a vector beside the weights, and what of the folder does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskvec_formats import Checkpoint
from taskvec_formats.description import BLOB_BYTES
from taskvec_formats.errors import HeaderError
from taskvec_formats.file_names import check_side_file_name

from ..errors import DiffError
from .lineage import shortened

KEY = "not_carried"
_NAMED = 50  # what a provenance names, beyond which it counts


@dataclass(frozen=True)
class Carried:
    """The side files that a vector carries, and what it does not, in words."""

    files: tuple[Path, ...]
    left_out: tuple[str, ...]


def carried(tuned: Checkpoint) -> Carried:
    """What a vector that gives a tuned folder back can carry of it.

    Side files travel as long as all of them together fit into a `.lota` file, the smallest first. Subfolders, weights
    in other files and permissions do not.

    Raises:
        DiffError: A side file has a name that no `.lota` file can give it.
    """
    files, left_out, executable = [], list(tuned.left_out), []
    room = BLOB_BYTES - sum(len(shard.header) for shard in tuned.shards)
    for file in sorted(tuned.side_files, key=lambda file: (file.stat().st_size, file.name)):
        try:
            check_side_file_name(file.name)
        except HeaderError as error:
            raise DiffError(f"{tuned.name}: {error}; rename the file or take it away") from None
        status = file.stat()
        if status.st_size > room:
            left_out.append(f"{file.name} ({status.st_size:,} bytes)")
            continue
        room -= status.st_size
        files.append(file)
        if status.st_mode & 0o111:
            executable.append(file.name)
    if executable:
        left_out.append(f"the permission to execute {', '.join(sorted(executable))}")
    return Carried(tuple(sorted(files)), tuple(left_out))


def changed_files(base: Checkpoint, tuned: Checkpoint) -> list[str]:
    """The names of the side files of a tuned folder that the base lacks or has with other content."""
    in_base = {file.name: file for file in base.side_files}
    return [
        file.name
        for file in tuned.side_files
        if file.name not in in_base or in_base[file.name].read_bytes() != file.read_bytes()
    ]


def record(left_out: Iterable[str]) -> dict[str, list[str]]:
    """What a vector adds to its provenance: the words for what it does not carry, or nothing."""
    words = [shortened(each) for each in left_out]
    if len(words) > _NAMED:
        words = [*words[:_NAMED], f"{len(words) - _NAMED:,} more"]
    return {KEY: words} if words else {}


def recorded(provenance: Mapping[str, Any]) -> tuple[str, ...]:
    """The same as a provenance says it."""
    words = provenance.get(KEY)
    return tuple(each for each in words if isinstance(each, str)) if isinstance(words, list) else ()
