"""Upload of a `.lota` file to the Hub, with a model card, in one commit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from taskvec_formats import Header, LotaReader

from ..errors import HubError, UsageError
from ..reporting.progress import Progress, silent
from . import card
from .base import COMMIT, recorded
from .client import asking, reason
from .reference import Reference, parse, without_secrets

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
_LICENSE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Pushed:
    """An upload of a vector.

    Attributes:
        repo: The repository.
        file: The path of the file in it.
        revision: The branch; that of the pull request, if one was opened.
        commit: The commit that contains the file, 40 hex digits.
        url: The address of the commit, or of the pull request.
        changed: Whether the commit is new. If not, the repository contained the same file and model card already.
        notes: One sentence for each thing of an existing model card that was kept although it differs.
    """

    repo: str
    file: str
    revision: str
    commit: str
    url: str
    changed: bool
    notes: tuple[str, ...]


def destination(
    repo: str, file: str | None = None, revision: str | None = None, *, name: str | None = None
) -> Reference:
    """Return the reference of a file to upload.

    Args:
        repo: `user/repo`, also with the file and the branch, as in any reference.
        file: The path in the repository, if `repo` does not contain it.
        revision: The branch, if `repo` does not contain it.
        name: The path in the repository if neither says it.

    Raises:
        UsageError: Something is given twice, or cannot be the name of a repository, a file or a branch.
    """
    for what, value in (("repo", repo), ("path_in_repo", file), ("revision", revision)):
        if not isinstance(value, str) and (what == "repo" or value is not None):
            raise UsageError(f"{what} must be a string, found {value!r:.80}")
    found = parse(repo)
    if found is None:
        raise UsageError(f"{without_secrets(repo)} is not a repository of the Hugging Face Hub: expected user/repo")
    for what, given, own in (("path_in_repo", file, found.file), ("revision", revision, found.revision)):
        if given is not None and own is not None and given != own:
            raise UsageError(f"`{what}` is {given}, but {repo} names {own}")
    path = name if file is None else file
    whole = Reference(found.repo, found.file or path, found.revision or revision, explicit=True)
    if whole.file is None or parse(str(replace(whole, revision=None))) != replace(whole, revision=None):
        raise UsageError(f"{whole.file!r:.200} cannot be the name of a .lota file in a repository")
    if parse(str(whole)) != whole:
        raise UsageError(f"{whole.revision!r:.200} cannot be the name of a branch")
    if whole.revision is not None and COMMIT.fullmatch(whole.revision):
        raise UsageError(f"{whole.revision} is a commit: `revision` is the branch to commit to")
    return whole


def push(
    reader: LotaReader,
    to: Reference,
    *,
    private: bool | None = None,
    message: str | None = None,
    create_pr: bool = False,
    progress: Progress = silent,
) -> Pushed:
    """Verify a file, and upload it with its section of the model card.

    The commit is made only if nobody has changed the branch since its model card was read.

    Args:
        reader: The file.
        to: Where to, as `destination` returns it.
        private: Whether a repository that is created is private; None for the default of the account.
        message: The message of the commit.
        create_pr: Whether to open a pull request.
        progress: Called while the file is verified.

    Raises:
        FormatError: The file is damaged.
        UsageError: The repository is public, but should be private.
        HubError: The Hub cannot be reached, refuses the upload, or does not have the file afterwards.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    assert to.file is not None
    reader.verify(lambda done, total: progress("verifying", done, total, ""))
    sha256 = reader.sha256()
    api = HfApi()
    head = _prepared(api, to, private)
    text = _existing_card(to, head)
    licensed, notes = _license(reader.header)
    there = Reference(to.repo, to.file, to.revision)
    body = card.section(there, reader.header, reader.size, sha256)
    metadata = card.metadata_of(reader.header, licensed)
    page, kept = card.updated(text, to.repo.rpartition("/")[2], to.file, metadata, body)
    operations = [
        CommitOperationAdd(to.file, reader.path),
        *([] if page == text else [CommitOperationAdd(CARD, page.encode())]),
    ]
    with asking(to, f"pushing to {to.repo}"), _metadata_accepted(to):
        done = api.create_commit(
            to.repo,
            operations,
            commit_message=message or f"Upload {to.file} with taskvec",
            revision=to.revision,
            create_pr=create_pr,
            parent_commit=head,
        )
    revision = done.pr_revision or to.revision or "main"
    _check(Reference(to.repo, to.file, done.oid), reader.size, sha256)
    url = without_secrets(done.pr_url or done.commit_url)
    return Pushed(to.repo, to.file, revision, done.oid, url, done.oid != head, (*kept, *notes))


@contextmanager
def _metadata_accepted(to: Reference) -> Iterator[None]:
    """Explain that the Hub does not accept the metadata of a model card, which it checks before the upload."""
    from huggingface_hub.errors import BadRequestError, HFValidationError

    try:
        yield
    except (BadRequestError, HFValidationError):
        raise
    except ValueError as error:
        raise HubError(
            f"{to.repo}: the Hugging Face Hub does not accept the metadata of {CARD} ({reason(error)})"
        ) from None


def _prepared(api: HfApi, to: Reference, private: bool | None) -> str:
    """Create the repository and the branch if they do not exist, and return the commit of the branch."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if get_token() is None:
        raise HubError(f"pushing to {to.repo} needs a token: set HF_TOKEN, or run `hf auth login`")
    with asking(to, f"pushing to {to.repo}"):
        try:
            found = api.model_info(to.repo)
        except RepositoryNotFoundError:
            api.create_repo(to.repo, private=private, exist_ok=True)
            found = api.model_info(to.repo)
        if private and not found.private:
            raise UsageError(f"{to.repo} exists and is public: `private` is for a repository that is created")
        if to.revision is not None:
            try:
                found = api.model_info(to.repo, revision=to.revision)
            except RevisionNotFoundError:
                api.create_branch(to.repo, branch=to.revision, exist_ok=True)
                found = api.model_info(to.repo, revision=to.revision)
    assert found.sha is not None
    return found.sha


def _existing_card(to: Reference, head: str) -> str | None:
    """Return the model card of a commit, None if it has none."""
    try:
        return _text(Reference(to.repo, revision=head, explicit=True), f"pushing to {to.repo}")
    except UnicodeDecodeError:
        raise HubError(f"{to.repo}: its {CARD} is not UTF-8 text: correct or remove it") from None


def _text(reference: Reference, what: str) -> str | None:
    """Return the README.md of a repository, not by way of the cache, None if it has none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with TemporaryDirectory() as folder, asking(reference, what):
        try:
            path = hf_hub_download(reference.repo, CARD, revision=reference.revision, local_dir=folder)
        except RemoteEntryNotFoundError:
            return None
        return Path(path).read_bytes().decode("utf-8-sig")


def _license(header: Header) -> tuple[Mapping[str, Any], list[str]]:
    """Return the metadata of the base that name its license, and a note if they are not known."""
    commit, base = recorded(header.provenance), card.base_model(header)
    if base is None:
        return {}, []
    try:
        text = _text(
            Reference(base, revision=commit.revision if commit else None, explicit=True), f"the license of {base}"
        )
    except (HubError, UnicodeDecodeError) as error:
        return {}, [f"the model card names no license: that of {base} is not known ({error})"]
    found = (card.read_metadata(text) if text else None) or {}
    named = {key: found[key] for key in _LICENSE if _is_text(found.get(key))}
    return named, [] if named else [f"the model card names no license: that of {base} names none"]


def _is_text(value: object) -> bool:
    """Return whether a value of the metadata of another repository is a string, or a list of strings."""
    return all(isinstance(each, str) for each in value) if isinstance(value, list) else isinstance(value, str)


def _check(pushed: Reference, size: int, sha256: str) -> None:
    """Check that the Hub has the file.

    Raises:
        HubError: It has another one.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    assert pushed.file is not None
    with asking(pushed):
        found = get_hf_file_metadata(hf_hub_url(pushed.repo, pushed.file, revision=pushed.revision))
    is_other = found.etag is not None and len(found.etag) == len(sha256) and found.etag != sha256
    if found.size != size or is_other:
        raise HubError(
            f"{pushed} is not the file that was verified: the Hub has {found.size} bytes with the digest {found.etag}, "
            f"expected {size} bytes with SHA-256 {sha256}; the file was changed during the upload"
        )
