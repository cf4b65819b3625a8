"""Errors of the Hub's client as errors of this package: one sentence for each cause, without tokens."""

from __future__ import annotations

import errno
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import HubError
from .reference import Reference, without_secrets


@contextmanager
def asking(reference: Reference, what: str = "") -> Iterator[None]:
    """Explain the errors of requests to the Hub (`explaining`). The client does not log while they run.

    Its own progress bars are shown on a terminal.

    Args:
        reference: What is asked for.
        what: The action, for error messages, if it is another than to read what the reference names.

    Raises:
        HubError: A request fails.
    """
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but not typed
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity

    shows = not are_progress_bars_disabled()
    if shows and not _is_terminal():
        disable_progress_bars()
    verbosity = get_verbosity()
    set_verbosity(max(verbosity, logging.ERROR))  # retries and failures are reported as one sentence
    try:
        with warnings.catch_warnings(), explaining(reference, what):
            warnings.filterwarnings("ignore", module="huggingface_hub")  # such as that of a full disk, before the error
            yield
    finally:
        set_verbosity(verbosity)
        if shows:
            enable_progress_bars()


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


@contextmanager
def explaining(reference: Reference, what: str = "") -> Iterator[None]:
    """Explain the errors of requests to the Hub. Several threads may do so at a time.

    Args:
        reference: As in `asking`.
        what: As in `asking`.

    Raises:
        HubError: A request fails.
    """
    from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError, RevisionNotFoundError

    try:
        yield
    except (request_error(), OSError, ValueError) as error:
        is_final = isinstance(error, (RevisionNotFoundError, RemoteEntryNotFoundError, HFValidationError))
        raise HubError(_public(_sentence(error, reference, what)), is_final=is_final) from None


def request_error() -> type[Exception]:
    """Return the base class of the errors of the HTTP library that the Hub's client uses, which depends on its version.

    It is also the class of HfHubHTTPError, for answers with an error code.
    """
    from huggingface_hub.errors import HfHubHTTPError

    found: type[Exception] = HfHubHTTPError.__bases__[0]
    return found


def _sentence(error: BaseException, reference: Reference, what: str) -> str:  # noqa: PLR0911 - a table of causes
    from huggingface_hub import constants, get_token
    from huggingface_hub import errors as hub

    repo, asked = reference.repo, what or str(reference)
    # what was given may be a local path with a typing error
    absent = f"{asked}:" if reference.explicit or what else f"{asked}: no such file or folder, and"
    while isinstance(error, hub.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    token = "the token gives no access to it" if get_token() else "no token is set (HF_TOKEN, or `hf auth login`)"
    site = without_secrets(constants.ENDPOINT)
    if isinstance(error, hub.GatedRepoError):
        return f"{repo} is gated, and {token}: its conditions are accepted on {site}/{repo}"
    if isinstance(error, hub.DisabledRepoError):
        return f"{repo} has been disabled by the Hugging Face Hub"
    if isinstance(error, hub.RepositoryNotFoundError):
        return f"{absent} the Hugging Face Hub has no model repository {repo}, or it is private and {token}"
    if isinstance(error, hub.RevisionNotFoundError):
        return f"{repo} has no revision {reference.revision or 'main'!r} on the Hugging Face Hub"
    if isinstance(error, hub.EntryNotFoundError) and not isinstance(error, hub.LocalEntryNotFoundError):
        return f"{repo} has no file {reference.file!r} at the revision {reference.revision or 'main'!r}"
    if isinstance(error, (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError)) and constants.HF_HUB_OFFLINE:
        where = "" if what else " it is not in the cache, and"
        return f"{absent}{where} HF_HUB_OFFLINE forbids requests to the Hugging Face Hub"
    if isinstance(error, hub.HFValidationError):
        return f"{asked} is not the name of a repository of the Hugging Face Hub"
    if isinstance(error, hub.HfHubHTTPError):
        return _answer(error, asked)
    return _of_client(error, asked) or f"{absent} the Hugging Face Hub, {site}, cannot be reached ({reason(error)})"


def _of_client(error: BaseException, asked: str) -> str | None:  # noqa: PLR0911 - a table of causes
    """Return a sentence for an error that the client or its cache makes, None for one of the connection."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if isinstance(error, UnicodeEncodeError):  # in a header; all other headers are ASCII
        return f"{asked}: the token that is set has characters that are not ASCII, unlike those of the Hugging Face Hub"
    if isinstance(error, ValueError):  # the name of a file, or an answer that is not JSON
        return f"{asked}: the client of the Hugging Face Hub cannot read this ({reason(error)})"
    if not isinstance(error, OSError):
        return None
    if str(error).startswith("Consistency check failed"):
        return f"{asked}: the Hugging Face Hub does not send the whole file ({reason(error)})"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{asked}: the disk of the cache {HF_HUB_CACHE} is full"
    forbidden = error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EPERM)
    if forbidden or HF_HUB_CACHE.startswith(str(error.filename)):
        return f"{asked}: the cache {HF_HUB_CACHE} cannot be written ({error.strerror})"
    return None


def _answer(error: BaseException, asked: str) -> str:
    """Return a sentence for an answer with an error code."""
    from huggingface_hub import get_token

    response = error.response  # type: ignore[attr-defined]  # that of an HfHubHTTPError
    status = response.status_code
    said = getattr(error, "server_message", None) or response.reason_phrase
    if status == 401:
        needs = "does not accept the token" if get_token() else "needs a token: set HF_TOKEN, or run `hf auth login`"
        return f"{asked}: the Hugging Face Hub {needs} ({said})"
    if status == 403:
        return f"{asked}: the Hugging Face Hub does not permit this with the token that is set ({said})"
    if status in (409, 412):
        return f"{asked}: the repository was changed by someone else in the meantime; try again ({said})"
    if status == 429:
        return f"{asked}: the Hugging Face Hub refuses further requests for now; try again later"
    return f"{asked}: the Hugging Face Hub answers {status} ({said})"


def _public(text: str) -> str:
    """Remove secrets from a text, and the token that `hf auth login` has stored."""
    from huggingface_hub import get_token

    token = get_token()
    return without_secrets(text.replace(token, "…") if token else text)


def reason(error: BaseException) -> str:
    """Return the first line of an error, or its type, without tokens."""
    lines = _public(str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
