"""The side files of a tuned folder that a vector carries, and the parts of the folder that it does not carry."""

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
_NAMED = 50  # the most parts that a provenance names; the rest is counted


@dataclass(frozen=True)
class Carried:
    """The side files that a vector carries, and descriptions of what it does not carry.

    Attributes:
        files: The side files to store, sorted by path.
        left_out: Descriptions of the parts that are not stored.
    """

    files: tuple[Path, ...]
    left_out: tuple[str, ...]


def carried(tuned: Checkpoint) -> Carried:
    """Select what a vector can store of a tuned folder besides the weights.

    Side files are stored, the smallest first, as long as all of them together fit into a `.lota` file. Subfolders,
    weights in other files and permissions are not stored.

    Args:
        tuned: The tuned checkpoint.

    Raises:
        DiffError: A side file has a name that cannot be stored in a `.lota` file.
    """
    files, left_out, executable = [], list(tuned.left_out), []
    room = BLOB_BYTES - sum(len(shard.header) for shard in tuned.shards)
    for file in sorted(tuned.side_files, key=lambda file: (file.stat().st_size, file.name)):
        try:
            check_side_file_name(file.name)
        except HeaderError as error:
            raise DiffError(f"{tuned.name}: {error}; rename or remove the file") from None
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
    """Return the names of the side files of a tuned folder that are missing or different in the base."""
    in_base = {file.name: file for file in base.side_files}
    return [
        file.name
        for file in tuned.side_files
        if file.name not in in_base or in_base[file.name].read_bytes() != file.read_bytes()
    ]


def record(left_out: Iterable[str]) -> dict[str, list[str]]:
    """Return the provenance entry that lists what a vector does not carry.

    Args:
        left_out: The descriptions.

    Returns:
        `{"not_carried": descriptions}`, or an empty dictionary if there are none.
    """
    words = [shortened(each) for each in left_out]
    if len(words) > _NAMED:
        words = [*words[:_NAMED], f"{len(words) - _NAMED:,} more"]
    return {KEY: words} if words else {}


def recorded(provenance: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the descriptions that `record` stored in a provenance."""
    words = provenance.get(KEY)
    return tuple(each for each in words if isinstance(each, str)) if isinstance(words, list) else ()
