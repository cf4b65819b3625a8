"""The layout of a result: its shards and side files, checked before anything is written.

Shard headers and side files come from the author of the vector, who may not be trusted. The tensors that a program
finds in the finished folder must be those that the vector describes, so the shards, their index and their names are
compared first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from taskvec_formats import Checkpoint, Form, SideFile
from taskvec_formats.checkpoint import CONFIG_BYTES, check_config, find_shards
from taskvec_formats.container import parse_header
from taskvec_formats.errors import CheckpointError, HeaderError
from taskvec_formats.file_names import INDEX, is_config

from ..errors import BaseMismatchError
from ..vectors.vector import TaskVector
from .shards import Shard
from .side_files import Files, content_of
from .verified import check_forms, mismatch


@dataclass(frozen=True)
class Layout:
    """The parts of a result.

    Attributes:
        shards: File name -> Shard.
        files: The side files by name.
        differences: The side files that cannot be as in the tuned checkpoint, one sentence each.
        keeps_files: Whether the side files are the base's, because the vector stores none.
        lacks_index: Whether the vector stores shards of its own, but no index of them.
    """

    shards: dict[str, Shard]
    files: Files
    differences: list[str]
    keeps_files: bool
    lacks_index: bool


def layout_of(vector: TaskVector, base: Checkpoint) -> Layout:
    """Return the layout of a vector applied to a base.

    Args:
        vector: A vector or a patch.
        base: The checkpoint to apply it to.

    Raises:
        HeaderError: The shards, side files and tensors of the vector do not fit each other.
        BaseMismatchError: They do not fit the base.
        CheckpointError: The base's own index does not fit its shards.
    """
    check_forms(vector, base)
    stored = vector.source.shards()
    side_files = vector.source.files()  # called only once, because it decodes the files
    files, differences = _side_files(side_files, base, laid_out_anew=stored is not None)
    shards = _shards(vector, base, stored)
    check_index(shards, files, f"the result of {vector.name} on {base.name}")
    keeps_files = side_files is None
    lacks_index = keeps_files and INDEX not in files and (stored is not None or not base.is_written)
    return Layout(shards, files, differences, keeps_files, lacks_index)


def check_stored_layout(vector: TaskVector) -> None:
    """Check the layout of a vector as far as possible without the base: stored shard headers, their index, their
    tensors.

    Args:
        vector: A vector or a patch.

    Raises:
        HeaderError: They do not fit each other.
    """
    stored = vector.source.shards()
    if stored is None:
        return
    shards = _parsed(vector, stored)
    places: dict[str, str] = {}
    for file, shard in shards.items():
        for name, form in shard.tensors.items():
            spec = vector.specs.get(name)
            if name in places:
                raise HeaderError(f"{vector.name}: tensor {name!r} is in both {places[name]} and {file}")
            if name in vector.header.removed or (spec and spec.form != form):
                raise _not_in_result(vector, file, name, form)
            places[name] = file
    if missing := sorted(vector.specs.keys() - places.keys()):
        raise HeaderError(f"{vector.name}: no shard contains {missing[0]!r}")
    for side_file in vector.source.files() or ():
        if side_file.name == INDEX and side_file.content is not None:
            check_index(shards, {INDEX: side_file.content}, vector.name)


def check_index(shards: Mapping[str, Shard], files: Files, where: str) -> None:
    """Check that a program that loads the folder finds exactly the planned shards.

    Args:
        shards: File name -> Shard.
        files: The side files by name.
        where: The name of the folder, for the error message.

    Raises:
        HeaderError: Shards and index disagree, the file names hide a shard, or a configuration names other weights.
    """
    index = content_of(files[INDEX]) if INDEX in files else None
    try:
        found, listed = find_shards({*shards, *files}, index, where)
        for name in filter(is_config, files):
            check_config(name, content_of(files[name])[: CONFIG_BYTES + 1], found, where)
    except CheckpointError as error:
        raise HeaderError(str(error)) from None
    if left := sorted(shards.keys() - set(found)):
        raise HeaderError(f"{where}: the shard {left[0]!r} is not found by a program that loads the model")
    for name, file in listed.items():
        if name not in shards[file].tensors:
            raise HeaderError(f"{where}: {INDEX} places tensor {name!r} in {file!r}, which does not contain it")


def _parsed(vector: TaskVector, headers: Mapping[str, bytes]) -> dict[str, Shard]:
    shards = {}
    for file, header in headers.items():
        try:
            _, tensors = parse_header(header)
        except HeaderError as error:
            raise HeaderError(f"{vector.name}: the header of shard {file!r}: {error}") from None
        shards[file] = Shard(header, {name: info.form for name, info in tensors.items()})
    return shards


def _not_in_result(vector: TaskVector, file: str, name: str, form: Form) -> HeaderError:
    return HeaderError(f"{vector.name}: shard {file!r} contains {name!r} as {form}, which the result does not")


def _shards(vector: TaskVector, base: Checkpoint, stored: Mapping[str, bytes] | None) -> dict[str, Shard]:
    """Return the shards of the result by file name. `stored` are the headers that the vector stores, if any."""
    shards = _parsed(vector, {shard.path.name: shard.header for shard in base.shards} if stored is None else stored)
    wanted = {name: info.form for name, info in base.tensors.items() if name not in vector.header.removed}
    wanted |= {name: spec.form for name, spec in vector.specs.items()}
    for file, shard in shards.items():
        for name, form in shard.tensors.items():
            if (found := wanted.pop(name, None)) == form:
                continue
            if name not in vector.specs and name not in vector.header.removed:
                # the vector does not change this tensor, so it must be in the base: the base is another revision
                raise mismatch(vector, base, f"tensor {name!r} should be {form}, found {found or 'none'}")
            raise _not_in_result(vector, file, name, form)
    if wanted and stored is None:
        raise HeaderError(f"{vector.name}: no shard contains {min(wanted)!r}")
    if wanted:
        # the base has tensors that the vector's base lacks: it is another revision of the model
        raise BaseMismatchError(
            f"{base.name} has tensor {min(wanted)!r}, which the base of {vector.name} does not have"
        )
    return shards


def _side_files(
    side_files: Sequence[SideFile] | None, base: Checkpoint, laid_out_anew: bool
) -> tuple[Files, list[str]]:
    """Return the side files of the result, and descriptions of those that cannot be as in the tuned checkpoint."""
    in_base = {file.name: file for file in base.side_files}
    if side_files is None:
        if laid_out_anew:
            in_base.pop(INDEX, None)  # it lists the shards of the base
        return dict(in_base), []
    files: Files = {}
    differences = []
    for side_file in side_files:
        if side_file.content is not None:
            files[side_file.name] = side_file.content
        elif side_file.name not in in_base:
            differences.append(f"{side_file.name} is not in the base")
        else:
            files[side_file.name] = content = in_base[side_file.name].read_bytes()
            if hashlib.sha256(content).hexdigest() != side_file.sha256:
                differences.append(f"{side_file.name} differs from the vector's base")
    return files, differences
