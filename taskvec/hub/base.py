"""The repository and the commit of the Hugging Face Hub that the base of a vector came from.

They are recorded in the provenance if the base was opened from the Hub, and copied to vectors that are made of others.
The base of a vector is identified by its fingerprint; this record only says where to find it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from taskvec_formats import Checkpoint, HubCommit, Identity

from ..errors import UsageError
from .models import open_checkpoint
from .reference import REPO_ID

KEY = "hub_base"
COMMIT = re.compile("[0-9a-f]{40}")


class Based(Protocol):
    """A vector or a term of a sum."""

    @property
    def name(self) -> str: ...
    @property
    def base(self) -> Identity: ...
    @property
    def provenance(self) -> Mapping[str, Any]: ...


def record(base: Checkpoint) -> dict[str, Any]:
    """Return the provenance entry of a vector of a base.

    Args:
        base: The base.

    Returns:
        `{"hub_base": {"repo": "user/repo", "revision": commit}}`, or an empty dictionary if it is not from the Hub.
    """
    found = base.commit
    return {} if found is None else {KEY: {"repo": found.repo, "revision": found.revision}}


def recorded(provenance: Mapping[str, Any]) -> HubCommit | None:
    """Return the repository and the commit that a provenance records; None if it has none, or no valid ones.

    Args:
        provenance: The provenance of a vector, possibly from an untrusted file.
    """
    found = provenance.get(KEY)
    repo, revision = (found.get("repo"), found.get("revision")) if isinstance(found, dict) else (None, None)
    if not isinstance(repo, str) or not isinstance(revision, str):
        return None
    return HubCommit(repo, revision) if REPO_ID.fullmatch(repo) and COMMIT.fullmatch(revision) else None


def inherited(parents: Iterable[Based]) -> dict[str, Any]:
    """Return the provenance entry of a vector that has the base of the first of its parents.

    Args:
        parents: The vectors that it is made of, in an order that does not depend on how they were given.
    """
    base: str | None = None
    for parent in parents:
        base = base or parent.base.fingerprint
        if parent.base.fingerprint == base and (found := recorded(parent.provenance)):
            return {KEY: {"repo": found.repo, "revision": found.revision}}
    return {}


def open_base(vector: Based) -> Checkpoint:
    """Open the base of a vector from the Hub, at the commit that is recorded.

    Args:
        vector: The vector.

    Raises:
        UsageError: The vector records no base on the Hub.
        HubError: The base cannot be downloaded.
        FormatError: It cannot be read.
    """
    found = recorded(vector.provenance)
    if found is None:
        raise UsageError(f"{vector.name} does not record a base on the Hugging Face Hub: give the base (`base`)")
    return open_checkpoint(f"hf://{found.repo}@{found.revision}")
