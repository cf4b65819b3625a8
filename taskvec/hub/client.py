"""Errors of the Hub's client as errors of this package: one sentence for each cause, without tokens."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import HubError
from .reference import Reference, without_secrets


@contextmanager
def asking(reference: Reference, what: str = "") -> Iterator[None]:
    """Explain the errors of requests to the Hub. The client does not log while they run.

    Args:
        reference: What is asked for.
        what: A file of the repository that the reference does not name, or an action, for error messages.

    Raises:
        HubError: A request fails.
    """
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import logging

    failures = (HfHubHTTPError, HfHubHTTPError.__mro__[1], HFValidationError, OSError)  # the second is of any request
    verbosity = logging.get_verbosity()
    logging.set_verbosity(max(verbosity, logging.ERROR))  # retries and failures are reported as one sentence
    try:
        yield
    except failures as error:
        is_final = isinstance(error, (RevisionNotFoundError, RemoteEntryNotFoundError))
        raise HubError(without_secrets(_sentence(error, reference, what)), is_final=is_final) from None
    finally:
        logging.set_verbosity(verbosity)


def _sentence(error: BaseException, reference: Reference, what: str) -> str:  # noqa: PLR0911 - a table of causes
    from huggingface_hub import constants, get_token
    from huggingface_hub import errors as hub

    given, repo = str(reference), reference.repo
    # what was given may be a local path with a typing error
    absent = given if reference.explicit or what else f"{given}: no such file or folder, and"
    while isinstance(error, hub.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    token = "the token gives no access to it" if get_token() else "no token is set (HF_TOKEN, or `hf auth login`)"
    site = without_secrets(constants.ENDPOINT)
    if isinstance(error, hub.GatedRepoError):
        return f"{repo} is gated, and {token}: its conditions are accepted on {site}/{repo}"
    if isinstance(error, hub.DisabledRepoError):
        return f"{repo} has been disabled by the Hugging Face Hub"
    if isinstance(error, hub.RepositoryNotFoundError):
        colon = ":" if absent == given else ""
        return f"{absent}{colon} the Hugging Face Hub has no model repository {repo}, or it is private and {token}"
    if isinstance(error, hub.RevisionNotFoundError):
        return f"{repo} has no revision {reference.revision or 'main'!r} on the Hugging Face Hub"
    if isinstance(error, hub.EntryNotFoundError) and not isinstance(error, hub.LocalEntryNotFoundError):
        return f"{repo} has no file {what or reference.file!r} at the revision {reference.revision or 'main'!r}"
    if isinstance(error, (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError)) and constants.is_offline_mode():
        missing = f"{given} is" if absent == given else f"{absent} it is"
        return f"{missing} not in the cache of the Hugging Face Hub, which HF_HUB_OFFLINE forbids to reach"
    if isinstance(error, hub.HFValidationError):
        return f"{given} is not the name of a repository of the Hugging Face Hub"
    if isinstance(error, hub.HfHubHTTPError):
        return _answer(error, reference, what, token)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{given} cannot be downloaded: the disk of the cache {constants.HF_HUB_CACHE} is full"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EPERM):
        return f"{given} cannot be downloaded: the cache {constants.HF_HUB_CACHE} cannot be written ({error.strerror})"
    missing = f"{given} is not available" if absent == given else f"{absent} it is not available"
    return f"{missing}: {site} does not answer as the Hugging Face Hub ({reason(error)})"


def _answer(error: BaseException, reference: Reference, what: str, token: str) -> str:
    """Return a sentence for an answer with an error code."""
    response = error.response  # type: ignore[attr-defined]  # that of an HfHubHTTPError
    status = response.status_code
    said = getattr(error, "server_message", None) or response.reason_phrase
    asked = what or str(reference)
    if status == 401:
        return f"{asked}: the Hugging Face Hub does not accept the request, because {token} ({said})"
    if status == 403:
        return f"{asked}: the Hugging Face Hub does not permit this, because {token} ({said})"
    if status == 429:
        return f"{asked}: the Hugging Face Hub refuses further requests for now; try again later"
    return f"{asked}: the Hugging Face Hub answers {status} ({said})"


def reason(error: BaseException) -> str:
    """Return the first line of an error, or its type, without tokens."""
    lines = without_secrets(str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
