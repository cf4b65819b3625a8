"""Reading rows of data from JSON lines, JSON, CSV and Parquet files, from folders of them, and from the Hub."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from ..arguments import said
from ..errors import DataError, UsageError
from ..packages import require
from ..vectors.lineage import shortened

_KINDS = {".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_EXPECTED = "JSON lines, JSON, CSV or Parquet"
_COMPRESSED = (".gz", ".zst")
_LOCAL = ("./", "../", "/", "~")
# organisation/name, optionally followed by a split, or a configuration and a split
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?::([\w.+-]+))?")
_MEDIA = {"Image", "Audio", "Video", "Pdf"}  # feature classes of the package datasets


@dataclass(frozen=True)
class Table:
    """Rows of one file, or of one split of a data set on the Hub.

    Attributes:
        rows: (name of the row for messages, row), in their order.
        record: Name and SHA-256, for the record of a run; for Hub data also configuration, split and revision.
    """

    rows: list[tuple[str, Any]]
    record: dict[str, object]


def data_path(text: str) -> Path:
    """Convert the text of a path or a Hub id to a Path.

    A text that begins with ./, ../, / or ~ is a local path, even if it looks like a Hub id otherwise. A Path drops a
    leading ./, so the check is made on the text.

    Args:
        text: A file, a folder or a Hub id.

    Raises:
        UsageError: The text is a local path that does not exist.
    """
    if text.startswith(_LOCAL) and not os.path.exists(text):
        raise UsageError(f"{text}: no such file")
    return Path(text)


def find_files(data: Path) -> list[Path]:
    """Find the files of a path, without reading them.

    A folder stands for the files directly in it, by name, that have a known ending and do not begin with a dot.

    Args:
        data: A file, a folder or a Hub id.

    Returns:
        The files; none for a Hub id.

    Raises:
        UsageError: The path does not exist and is not a Hub id, there is nothing to read, a file is not a regular file
            (a FIFO may block forever, a device may never end), or a package is missing.
    """
    if os.path.isdir(data):
        if (data / "config.json").exists():
            raise UsageError(f"{data} is a model folder; expected {_EXPECTED}")
        files = sorted(
            path for path in data.iterdir() if _kind(path) and not path.name.startswith(".") and not path.is_dir()
        )
        if not files:
            raise UsageError(f"{data} is a folder without data; expected names that end in {', '.join(_KINDS)}")
    elif os.path.exists(data):
        files = [data]
    elif _hub_id(data):
        require(f"{data}: no such file; a data set of the Hub", "data", "datasets")
        return []
    else:
        raise UsageError(f"{data}: no such file")
    for file in files:
        if not os.path.isfile(file):
            raise UsageError(f"{file} is not a regular file; expected {_EXPECTED}")
        if _kind(file) == "parquet":
            require(str(file), "data", "pyarrow")
    return files


def read_tables(data: Path) -> list[Table]:
    """Read the files of a path (`find_files`), or a split of a data set on the Hub.

    Args:
        data: A file, a folder or a Hub id: org/name, org/name:split or org/name:configuration:split. The default split
            is "train".

    Raises:
        UsageError: As in `find_files`, or the Hub data cannot be loaded.
        DataError: A file is damaged or empty. The message names file and row.
    """
    files = find_files(data)
    if not files:
        tables = [_read_hub(data)]
    elif os.path.isdir(data):
        tables = [_read_file(file, f"{data.name}/{file.name}") for file in files]
    else:
        tables = [_read_file(data, data.name)]
    return tables


def _kind(path: Path) -> str | None:
    """Format of a file, by the ending of its name; None if the ending is unknown."""
    name = path.name.lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return _KINDS.get(os.path.splitext(name)[1])


def _is_data_name(name: str) -> bool:
    """Whether a name has the ending of a data file."""
    return _kind(Path(name)) is not None or name.lower().endswith(_COMPRESSED)


def _hub_id(data: Path) -> tuple[str, str | None, str] | None:
    """(organisation/name, configuration, split), or None if it is not a Hub id."""
    match = _HUB_ID.fullmatch(str(data))
    if match is None or match[1].startswith(_LOCAL) or _is_data_name(match[1]):
        return None
    name, first, second = match.groups()
    return (name, first, second) if second else (name, None, first or "train")


def _read_file(path: Path, name: str) -> Table:
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error})") from None
    content, kind = _decompressed(path, stored), _kind(path)
    if kind == "parquet":
        rows = _parquet_rows(path, content)
    elif kind == "csv":
        rows = list(_csv_rows(path, _text(path, content)))
    else:
        text = _text(path, content)
        # a .json file may contain a list or JSON lines
        is_list = kind == "json" and text.lstrip().startswith("[")
        rows = _json_rows(path, text) if is_list else list(_line_rows(path, text))
    if not rows:
        raise DataError(f"{path}: the file is empty")
    return Table(rows, {"name": shortened(name), "sha256": hashlib.sha256(stored).hexdigest()})


def _decompressed(path: Path, stored: bytes) -> bytes:
    ending = path.suffix.lower()
    try:
        if ending == ".gz":
            return gzip.decompress(stored)
        if ending == ".zst":
            return _unzstd(stored)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path} cannot be decompressed ({error})") from None
    return stored


def _unzstd(stored: bytes) -> bytes:
    """Decompress all frames of a zstandard file. Raises EOFError if the last is cut off: stream readers ignore that."""
    frames = []
    while stored:
        frame = zstandard.ZstdDecompressor().decompressobj()
        frames.append(frame.decompress(stored))
        if not frame.eof:
            raise EOFError("the file ends too early")
        stored = frame.unused_data
    return b"".join(frames)


def _text(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")  # some programs write a byte order mark
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error})") from None


def _line_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Parse JSON lines. Blank lines are errors, except at the end."""
    # not splitlines(): JSON strings may contain U+2028 and other line separators unescaped
    lines = text.rstrip().split("\n")
    if lines == [""]:
        return
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip():
            raise DataError(f"{where}: empty line")
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON ({error})") from None


def _json_rows(path: Path, text: str) -> list[tuple[str, Any]]:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    return [(_row(path, number), item) for number, item in enumerate(items, 1)]


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Parse CSV. The first line names the columns, and every cell is text, even if it looks like a number."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text.rstrip("\r\n"), newline=""), strict=True)
    number = 0
    try:
        columns = next(reader, [])
        if len(set(columns)) < len(columns):
            raise DataError(f"{path}: the first line names a column twice: {said(columns, 200)}")
        for number, cells in enumerate(reader, 1):
            if len(cells) != len(columns):
                raise DataError(f"{_row(path, number)}: expected {len(columns)} cells, found {len(cells)}")
            yield _row(path, number), dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{_row(path, number + 1)}: not valid CSV ({error})") from None


def _parquet_rows(path: Path, content: bytes) -> list[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        items = parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{path} cannot be read as Parquet ({said(reason[0], 200)[1:-1]})") from None
    return [(_row(path, number), _without_nulls(item)) for number, item in enumerate(items, 1)]


def _row(path: object, number: int) -> str:
    return f"{path}, row {number}"


def _without_nulls(value: Any) -> Any:
    """Remove null fields: Arrow gives every row all fields of the column's type, null if the row lacks them."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _read_hub(data: Path) -> Table:
    import datasets

    found = _hub_id(data)
    assert found is not None
    name, config, split = found
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, config, split=split)
        # they are not used for training, and decoding them is slow and needs further packages
        media = [column for column, kind in loaded.features.items() if type(kind).__name__ in _MEDIA]
        loaded = loaded.remove_columns(media)
        items = [_without_nulls(item) for item in loaded]
    except MemoryError:
        raise
    except Exception as error:  # from the network, the Hub, the builder or the files
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"{data}: no such file, and {name} cannot be loaded from the Hub, split {split!r}: "
            f"{said(reason[0], 300)[1:-1]}"
        ) from None
    if not items:
        raise DataError(f"{data}: the split {split!r} is empty")
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item, sort_keys=True, default=str).encode() + b"\n")
    revisions = {m[1] for url in loaded.info.download_checksums or () if (m := re.search("@([0-9a-f]{40})/", url))}
    record = {
        "name": shortened(name),
        "config": loaded.info.config_name,
        "split": split,
        "revision": min(revisions, default=None),
        "sha256": digest.hexdigest(),
    }
    return Table([(_row(f"{name}:{split}", number), item) for number, item in enumerate(items, 1)], record)
