"""Files of task vectors on the Hub: which one a reference means, its download, and its bytes without a download."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import HubError
from .client import asking, explaining
from .ranges import RemoteFile
from .reference import Reference

_MOST = 20  # files that an error lists


def vector_name(reference: Reference) -> Reference:
    """Return a reference that names its file.

    Args:
        reference: A reference to a `.lota` file, or to a repository that contains one.

    Raises:
        HubError: The repository contains none or several; or the Hub cannot be reached, and nothing is in its cache.
    """
    if reference.file is not None:
        return reference
    names = sorted(name for name in files_of(reference) if name.endswith(".lota"))
    if not names:
        raise HubError(f"{reference} contains no .lota file")
    if len(names) > 1:
        listed = ", ".join(names[:_MOST]) + (", …" if len(names) > _MOST else "")
        raise HubError(
            f"{reference} contains {len(names)} .lota files: name one of them, as in "
            f"{replace(reference, file=names[0])} ({listed})"
        )
    return replace(reference, file=names[0])


def files_of(reference: Reference) -> list[str]:
    """Return the names of the files of a repository.

    If the Hub cannot be reached, these are the files of the repository in its cache.

    Args:
        reference: The repository.

    Raises:
        HubError: The repository or its revision does not exist or cannot be read.
    """
    from huggingface_hub import HfApi

    try:
        with asking(reference):
            info = HfApi().model_info(reference.repo, revision=reference.revision)
        return [sibling.rfilename for sibling in info.siblings or ()]
    except HubError as error:
        if error.is_final or (folder := _snapshot(reference)) is None:
            raise
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _snapshot(reference: Reference) -> Path | None:
    """Return the folder of a revision in the Hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=reference.repo, repo_type="model")
    revision = reference.revision or "main"
    ref = folder / "refs" / revision
    snapshot = folder / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision)
    return snapshot if snapshot.is_dir() else None


def download(reference: Reference) -> Path:
    """Download a file to the Hub's cache, unless it is there, and return its path.

    Args:
        reference: The file.

    Raises:
        HubError: It does not exist, cannot be read, or cannot be stored.
    """
    from huggingface_hub import hf_hub_download

    assert reference.file is not None
    if isinstance(cached := _located(reference), Path):
        return cached
    with asking(reference):
        return Path(hf_hub_download(reference.repo, reference.file, revision=reference.revision))


def remote(reference: Reference) -> Path | RemoteFile:
    """Open a file on the Hub without a download, at the commit that its revision is now.

    Args:
        reference: The file.

    Returns:
        The bytes on the Hub, or the path of the file if it is in the Hub's cache.

    Raises:
        HubError: It does not exist or cannot be read.
    """
    found = _located(reference)
    if isinstance(found, Path):
        return found
    commit, size = found
    if isinstance(cached := _cached(reference, commit), Path):
        return cached
    if size is None:
        raise HubError(f"{reference}: the server does not name the size of the file, as the Hugging Face Hub does")
    return RemoteFile(replace(reference, revision=commit, explicit=False), size)


def _located(reference: Reference) -> Path | tuple[str, int | None]:
    """Return the commit and the size of a file; the file in the cache if the Hub cannot be reached.

    The client would first try again for half a minute.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    assert reference.file is not None
    try:
        with asking(reference):
            found = get_hf_file_metadata(hf_hub_url(reference.repo, reference.file, revision=reference.revision))
    except HubError as error:
        if error.is_final or (cached := _cached(reference, reference.revision)) is None:
            raise
        return cached
    if found.commit_hash is None:
        raise HubError(f"{reference}: the server does not name the commit of the file, as the Hugging Face Hub does")
    return found.commit_hash, found.size


def _cached(reference: Reference, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    assert reference.file is not None
    with explaining(reference):
        found = try_to_load_from_cache(reference.repo, reference.file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def commit_of(cached: Path) -> str:
    """Return the commit of a file in the Hub's cache.

    Args:
        cached: Its path, as `download` returns it.
    """
    parts = cached.parts
    return parts[len(parts) - parts[::-1].index("snapshots")]
