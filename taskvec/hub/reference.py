"""References to repositories of the Hugging Face Hub and to files in them.

A reference is `user/repo`, `user/repo@revision`, `user/repo/file.lota` or `user/repo/file.lota@revision`, each also
after `hf://`. The Hub's own form `user/repo@revision/file.lota` is read too. A local path of that name wins, unless the
reference has the prefix.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from ..errors import UsageError

REPO_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_PREFIX = re.compile(r"hf:/+")
_JOINED = re.compile(r"\A([A-Za-z][A-Za-z0-9+.-]*:)/(?!/)")  # a Path joins the slashes of a URL
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/+")
_REPO = re.compile(rf"({REPO_ID.pattern})(?:/([^@]+))?(?:@(.+))?", re.ASCII)
_OF_REVISION = re.compile(r"(refs/pr/\d+|refs/convert/[\w.-]+|[^/]+)/(.+\.lota)")
_LOCAL = (".lota", ".safetensors")  # endings of files, which names of repositories do not have
_CREDENTIALS = re.compile(r"(?<=:/)(/*)[^/@\s]+@")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{6,}")
_QUERY = re.compile(r"((?:\b[a-z]+://|\(…\))[^\s?'\"]+)\?[^\s'\")]*", re.IGNORECASE)  # the client cuts long URLs


@dataclass(frozen=True)
class Reference:
    """A repository of the Hub, or a file in it.

    Attributes:
        repo: The repository, "user/repo".
        file: The path of a `.lota` file in it, or None.
        revision: A branch, a tag or a commit; None for the main branch.
        explicit: Whether it was written with the prefix `hf://`, so that it can be no local path.
    """

    repo: str
    file: str | None = None
    revision: str | None = None
    explicit: bool = False

    def __str__(self) -> str:
        file = "" if self.file is None else f"/{self.file}"
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{'hf://' if self.explicit else ''}{self.repo}{file}{revision}"


def reference_to(place: str | os.PathLike[str], *, file: bool) -> Reference | None:
    """Parse what a user gives for a model or a vector.

    Args:
        place: A path or a reference.
        file: Whether the reference may name a file, as that of a vector may.

    Returns:
        The reference. None if the path exists, and if it can only be a local path.

    Raises:
        UsageError: It begins with `hf://` and is no reference, or is another URL.
    """
    text = os.fsdecode(os.fspath(place))
    prefix = _PREFIX.match(text)
    if prefix is None and os.path.exists(text):  # Path.exists would raise an error for a name that is too long
        return None
    if prefix is None and _URL.match(text):
        raise UsageError(
            f"{written(text)}: no such file or folder; a model or vector of the Hub is written as user/repo"
        )
    found = parse(text)
    if found is not None and (file or found.file is None):
        return found
    if prefix is not None:
        forms = "user/repo, user/repo@revision or user/repo/file.lota" if file else "user/repo or user/repo@revision"
        raise UsageError(f"{written(place)} is not a reference to the Hub: expected hf:// and {forms}")
    return None


def parse(text: str) -> Reference | None:
    """Parse a reference, without a look at local paths.

    Args:
        text: The reference.

    Returns:
        The reference. None if the text is none, or can only be a local path.
    """
    prefix = _PREFIX.match(text)
    match = _REPO.fullmatch(text if prefix is None else text[prefix.end() :])
    if match is None or not text.isprintable():
        return None
    repo, file, revision = match.groups()
    if file is None and revision is not None and (inside := _OF_REVISION.fullmatch(revision)):
        revision, file = inside.groups()
    parts = [] if file is None else file.split("/")
    if any(part in ("", ".", "..") for part in parts) or (file is not None and not file.endswith(".lota")):
        return None
    if revision is not None and ".." in revision:  # no name in Git, but a path in the cache
        return None
    if prefix is None and file is None and repo.endswith(_LOCAL):
        return None
    return Reference(repo, file, revision, explicit=prefix is not None)


def written(place: str | os.PathLike[str]) -> str:
    """Return a path or a reference as its user wrote it, without a token."""
    return without_secrets(_JOINED.sub(r"\1//", os.fsdecode(os.fspath(place))))


def without_secrets(text: str) -> str:
    """Remove tokens of the Hub, and the user, password and query of URLs, from a text."""
    text = _TOKEN.sub("hf_…", _CREDENTIALS.sub(r"\1", _QUERY.sub(r"\1", text)))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name, "").strip():
            text = text.replace(token, "…")
    return text
