"""A file of a repository that is read by HTTP ranges, without a download of the whole."""

from __future__ import annotations

import re
import time

from ..errors import HubError
from .client import explaining, reason, request_error
from .reference import Reference

# header and index of most files, in one request
_FIRST = 1 << 16
_WAITS = (0.5, 1.0, 2.0, None)  # seconds before each further try; None ends them
_SECONDS = 30.0  # without an answer
_TRY_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class RemoteFile:
    """The bytes of a file of the Hub at one commit (`taskvec_formats.reading.Readable`).

    Args:
        reference: The file, whose revision is a commit, so that all ranges are of one state of the file.
        size: Its size in bytes.

    Attributes:
        name: The reference.
        size: As given.

    Raises:
        HubError: As in `read`.
    """

    def __init__(self, reference: Reference, size: int) -> None:
        self._reference = reference
        self.name = str(reference)
        self.size = size
        self._first = memoryview(b"")
        self._first = self.read(0, min(size, _FIRST))

    def read(self, start: int, stop: int) -> memoryview:
        """Read the bytes [start, stop).

        Args:
            start: First byte.
            stop: Byte after the last one.

        Raises:
            HubError: The Hub cannot be reached, does not send exactly these bytes, or has another file of that name.
        """
        if stop <= len(self._first) or start == stop:
            return self._first[start:stop]
        for wait in _WAITS:
            found, failure = self._fetch(start, stop)
            if found is not None:
                return memoryview(found)
            if wait is not None:
                time.sleep(wait)
        raise HubError(f"{self.name}: bytes {start} to {stop} cannot be read from the Hugging Face Hub ({failure})")

    def _fetch(self, start: int, stop: int) -> tuple[bytes | None, str]:
        """Return the bytes, or None and the reason if another try may succeed."""
        from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, but not typed

        assert self._reference.file is not None
        url = hf_hub_url(self._reference.repo, self._reference.file, revision=self._reference.revision)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with explaining(self._reference):
            try:
                with get_session().stream("GET", url, headers=headers, timeout=_SECONDS) as response:
                    if response.status_code in _TRY_AGAIN:
                        return None, f"it answers {response.status_code}"
                    if response.status_code >= 400:
                        response.read()
                    hf_raise_for_status(response)
                    self._check(response.status_code, response.headers.get("Content-Range", ""), start, stop)
                    body = bytearray()
                    for part in response.iter_raw():
                        body += part
                        if len(body) > stop - start:
                            break
            except HfHubHTTPError:
                raise
            except request_error() as error:
                return None, reason(error)
        if len(body) != stop - start:
            return None, f"{'more' if len(body) > stop - start else len(body)} bytes were sent"
        return bytes(body), ""

    def _check(self, status: int, content_range: str, start: int, stop: int) -> None:
        """Check the answer before its body is read.

        Raises:
            HubError: It is not the range that was asked for.
        """
        if status == 200 and (start, stop) == (0, self.size):
            return
        if status != 206:
            raise HubError(
                f"{self.name}: the server sends the whole file instead of a part of it (status {status}): download it "
                "with taskvec pull"
            )
        found = _RANGE.fullmatch(content_range)
        if found is not None and int(found[3]) != self.size:
            raise HubError(
                f"{self.name} was changed while it was read: it had {self.size} bytes, now it has {found[3]}"
            )
        if found is None or (int(found[1]), int(found[2])) != (start, stop - 1):
            raise HubError(
                f"{self.name}: asked for bytes {start} to {stop - 1}, the server sends {content_range!r:.80}"
            )
