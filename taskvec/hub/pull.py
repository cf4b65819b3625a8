"""Download of a `.lota` file to a path of the user's choice."""

from __future__ import annotations

import shutil
from pathlib import Path

from taskvec_formats import FormatError, LotaReader
from taskvec_formats.system.atomic import atomic_file

from ..destination import appearing, check_file
from ..errors import UsageError
from ..reporting.progress import Progress, silent
from .reference import Reference, parse, without_secrets
from .vectors import commit_of, download, vector_name


def located(vector: str, output: Path | None, *, force: bool = False) -> tuple[Reference, Path]:
    """Find the file that a reference means, and check the output, before the download.

    Args:
        vector: The reference.
        output: The file to write. None for the name of the file on the Hub.
        force: Whether an existing file may be replaced.

    Raises:
        UsageError: It is no reference; or as in `check_file`.
        HubError: As in `vector_name`.
    """
    found = parse(vector)
    if found is None:
        raise UsageError(
            f"{without_secrets(vector)} is not a file of the Hugging Face Hub: expected user/repo/file.lota"
        )
    if output is not None:
        check_file(output, force=force)
    reference = vector_name(found)
    assert reference.file is not None
    return reference, output or check_file(Path(reference.file).name, force=force)


def pull_file(reference: Reference, path: Path, progress: Progress = silent, *, force: bool = False) -> str:
    """Download a file, check all of it, and copy it to a path, where it appears when it is complete.

    Args:
        reference: The file.
        path: The file to write, which is checked.
        progress: Called while the file is verified.
        force: Whether to replace an existing file.

    Returns:
        The commit that the file is from.

    Raises:
        HubError: It cannot be downloaded.
        FormatError: It is damaged.
        OutputExistsError: `path` exists and `force` is False.
    """
    cached = download(reference)
    with appearing(path), atomic_file(path, replace=force) as temporary:
        with open(cached, "rb") as source, open(temporary, "wb") as target:
            shutil.copyfileobj(source, target)  # an error then names the output
        try:
            LotaReader(temporary).verify(lambda done, total: progress("verifying", done, total, ""))
        except FormatError as error:
            text = str(error).replace(str(temporary), str(reference))
            raise type(error)(f"{text}; to download it again, remove {cached}") from None
    return commit_of(cached)
