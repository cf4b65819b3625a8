"""The plan of a result: every file, its size, and its differences from the tuned checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from taskvec_formats import Checkpoint, Form, ModelFolder
from taskvec_formats.errors import FormatError
from taskvec_formats.header import stored_digest

from ..errors import ResultError, SizeError
from ..vectors import carried
from ..vectors.diff import LAYOUT, layout_digest
from ..vectors.vector import TaskVector
from .layout import Layout, layout_of
from .output import Output
from .shards import Shard, arrange, file_bytes
from .side_files import Files, new_index, written_files

# the default limit of a result: this factor times the size of the base, plus this number of bytes
_GROWTH, _SLACK = 4, 1 << 28


@dataclass(frozen=True)
class Plan:
    """The files of a result, determined before any of them is written.

    Attributes:
        vector: The vector to apply.
        base: The checkpoint to apply it to.
        output: How the result is written.
        layout: The layout of the result before the output options are applied.
        shards: The shards to write, by file name.
        files: The side files to write, by name.
    """

    vector: TaskVector
    base: Checkpoint
    output: Output
    layout: Layout
    shards: Mapping[str, Shard]
    files: Files

    @cached_property
    def size(self) -> int:
        """The number of bytes of all files."""
        sizes = (len(file) if isinstance(file, bytes) else file.stat().st_size for file in self.files.values())
        return sum(file_bytes(shard, self.output) for shard in self.shards.values()) + sum(sizes)

    @property
    def left_out(self) -> tuple[str, ...]:
        """The parts of the tuned folder that are not written; of the base's folder if the side files are the base's."""
        return tuple(self.base.left_out) if self.layout.keeps_files else carried.recorded(self.vector.provenance)

    @property
    def record(self) -> dict[str, Any]:
        """The parameters, as JSON, that must be the same for another run to reuse finished shards."""
        headers = {name: stored_digest(shard.header) for name, shard in self.shards.items()}
        output = {"dtype": self.output.dtype, "shard_size": self.output.shard_size, "shards": headers}
        return {"base": self.base.identity, "output": output}

    def check_size(self, most: int | None) -> None:
        """Check that the size of the result is in proportion to the base.

        A tensor that a vector adds is zero where the vector has no value, so a small file can describe a huge model.

        Args:
            most: The largest size in bytes. None allows four times the base and 2^28 bytes.

        Raises:
            SizeError: The result is larger.
        """
        held = sum(info.form.size * info.dtype.itemsize for info in self.base.tensors.values())
        limit = _GROWTH * held + _SLACK if most is None else most
        if self.size > limit:
            raise SizeError(
                f"{self.vector.name} makes a model of {self.size:,} bytes from {self.base.name}, which has {held:,}; "
                f"the limit is {limit:,} bytes unless `max_bytes` allows more"
            )

    def check_space(self, out: Path, work: Path | None) -> None:
        """Check that the disk has room for the result.

        Args:
            out: Where the result is written.
            work: A folder on the same disk whose files are already part of the result.

        Raises:
            SizeError: The disk has not enough free space.
        """
        folder = next(parent for parent in out.absolute().parents if parent.exists())
        free = shutil.disk_usage(folder).free
        if work is not None and work.is_dir():
            free += sum(file.stat().st_size for file in work.iterdir())
        if self.size > free:
            raise SizeError(f"{out} needs {self.size:,} bytes, but only {free:,} are free in {folder}")

    def check_written(self, folder: Path) -> Checkpoint:
        """Read the finished folder again, as a program that loads the model does, and compare it with the plan.

        Args:
            folder: The folder that was written.

        Returns:
            The checkpoint in it.

        Raises:
            ResultError: A file or a tensor is missing, is different, or was not planned.
        """
        expected = {name: form for shard in self.shards.values() for name, form in self._forms(shard).items()}
        try:
            found = ModelFolder(folder)
        except FormatError as error:
            raise ResultError(f"the model that was written cannot be read: {error}") from None
        if {file.name for file in folder.iterdir()} != self.shards.keys() | self.files.keys():
            raise ResultError(
                "the model that was written lacks a file: the file system may treat two of its names as the same"
            )
        for name, form in expected.items():
            info = found.tensors.get(name)
            if info is None or info.form != form:
                raise ResultError(
                    f"the model that was written has tensor {name!r} as {info and info.form}, not as {form}"
                )
        if more := sorted(found.tensors.keys() - expected.keys()):
            raise ResultError(f"the model that was written has tensor {more[0]!r}, which the result does not")
        return found

    def differences(self, written: Checkpoint) -> tuple[str, ...]:
        """Return the reasons why the result is not the tuned checkpoint of the vector, one sentence each.

        Args:
            written: The finished result.
        """
        differences = list(self.layout.differences)
        tuned = self.vector.header.tuned
        if tuned is None:
            return tuple(differences)
        # tensors of another dtype differ from the tuned checkpoint in any case, and are named below
        keeps = all(self._forms(shard) == dict(shard.tensors) for shard in self.shards.values())
        recorded = self.vector.provenance.get(LAYOUT, layout_digest(self.base))
        if keeps and written.fingerprint != tuned.fingerprint:
            differences.insert(0, "weights that the vector does not change differ from its base")
        elif self.vector.source.shards() is None and recorded != layout_digest(self.base):
            differences.append(f"the shards are those of {self.base.name}, not those of the vector's base")
        for planned, as_tuned in ((self.shards, self.layout.shards), (self.files, self.layout.files)):
            differences += [f"{name} is rewritten" for name in sorted(planned) if planned[name] != as_tuned.get(name)]
        return tuple(differences)

    def _forms(self, shard: Shard) -> dict[str, Form]:
        """Return the form in which each tensor of a shard is written."""
        return {name: self.output.form(form) for name, form in shard.tensors.items()}


def plan_of(vector: TaskVector, base: Checkpoint, output: Output) -> Plan:
    """Plan a result.

    Args:
        vector: The vector to apply.
        base: The checkpoint to apply it to.
        output: How to write the result.

    Raises:
        HeaderError, BaseMismatchError, CheckpointError: As in `layout_of`.
        UsageError: A dtype is given for a quantised model.
    """
    layout = layout_of(vector, base)
    files = written_files(layout.files, base.name, output)
    shards = arrange(layout.shards, output)
    files |= new_index(files, shards, output, lacking=layout.lacks_index)
    return Plan(vector, base, output, layout, shards, files)
